"""Stored frames as video input: every frame reaches the processor, whatever it would sample by itself."""

from __future__ import annotations

import pytest

from evaluation.media import StoredFrames
from st_btok import build_model
from tests.backbones import build
from tests.evaluation.conftest import picture


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize(("frames", "patches"), [(8, 4), (1, 1)])
def test_all_stored_frames_are_shown(family, frames, patches):
    """Qwen3-VL's processor samples frames without a rate (4 of 8), and refuses a single one."""
    backbone, processor = build(family)
    model = build_model(backbone, processor=processor, device="cpu")
    video = StoredFrames(tuple(picture(i) for i in range(frames))).as_video()
    features = model.preprocess([{"video": video, "text": "a"}])
    assert features["video_grid_thw"][0, 0] == patches, "two frames make one temporal patch"
