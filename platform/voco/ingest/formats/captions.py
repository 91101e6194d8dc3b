"""A caption of an image as a conversation: a short request to describe it, which the caption answers."""

from __future__ import annotations

import hashlib

REQUESTS = (
    "Describe this image briefly.",
    "What does the image show, in one sentence?",
    "Give a short caption for the picture.",
    "Sum up the image in a few words.",
    "Say shortly what can be seen here.",
    "Write one line about this picture.",
    "What is in the image? Keep it short.",
    "Provide a concise description of the image.",
)


def image_request(identity: str) -> tuple[str, str]:
    """The request and where its placeholder stands, before or after: always the same for the same image, as CC3M mixes them."""
    spread = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).digest()
    request = REQUESTS[int.from_bytes(spread[:8], "big") % len(REQUESTS)]
    return request, ("before", "after")[spread[8] % 2]
