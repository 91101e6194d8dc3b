"""VoCo-LLaMA (arXiv 2406.12275): N <voco> tokens follow each view, and text reads a view through them alone.

The mask and the positions do this (docs/method.md); features stay as they are.
"""

from __future__ import annotations

from voco.methods import Method

METHOD = Method()
