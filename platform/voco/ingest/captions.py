"""A caption as a conversation: a short request to describe the image or video, which the caption answers."""

from __future__ import annotations

import hashlib

IMAGE_REQUESTS = (
    "Describe this image briefly.",
    "What does the image show, in one sentence?",
    "Give a short caption for the picture.",
    "Sum up the image in a few words.",
    "Say shortly what can be seen here.",
    "Write one line about this picture.",
    "What is in the image? Keep it short.",
    "Provide a concise description of the image.",
)

VIDEO_REQUESTS = (
    "Describe this video briefly.",
    "What happens in this video, in one sentence?",
    "Give a short caption for the video.",
    "Sum up the clip in a few words.",
    "Say shortly what the video shows.",
    "Write one line about this clip.",
    "What can be seen in this video? Keep it short.",
    "Provide a concise description of the clip.",
)


def image_request(identity: str) -> tuple[str, str]:
    """The request and the position of its placeholder, before or after. Both vary between images, as in CC3M's chat.json.

    The same `identity` always gets the same request and position.
    """
    digest = _digest(identity)
    return IMAGE_REQUESTS[int.from_bytes(digest[:8], "big") % len(IMAGE_REQUESTS)], ("before", "after")[digest[8] % 2]


def video_request(identity: str) -> str:
    """The request. The same `identity` always gets the same one."""
    return VIDEO_REQUESTS[int.from_bytes(_digest(identity)[:8], "big") % len(VIDEO_REQUESTS)]


def _digest(identity: str) -> bytes:
    return hashlib.sha256(identity.encode("utf-8", "surrogateescape")).digest()
