"""No compression, the upper bound: text sees every vision token and every <voco>, under a plain causal mask."""

from __future__ import annotations

from voco.methods import Method

METHOD = Method()
