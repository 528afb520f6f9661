"""Suite generation: its models run, and its numbers are of what it says."""

import pytest

from attnkit.bench import generation, training

pytest.importorskip("transformers")


def test_a_run() -> None:
    document = generation.run(generation.SMALL, rounds=1, seconds=0.0)
    speeds = {r["cache"]: r for r in document["runs"] if "cache" in r}
    assert list(speeds) == [generation.SDPA, *generation.CODECS]
    assert all(r["tokens_per_s"]["median"] > 0 for r in speeds.values())
    assert speeds["int8"]["bytes"] < speeds["bf16"]["bytes"]
    costs = {(r["codec"], r["residual"]): r["perplexity"] for r in document["runs"] if "codec" in r}
    assert costs["bf16", 128] == pytest.approx(costs["none", None], rel=1e-3)
    assert costs["int4", 0] != costs["int4", 128]  # 64 tokens are all among the newest 128
    assert costs["int4", 128] == pytest.approx(costs["bf16", 128], rel=1e-3)
    assert 1 < costs["none", None] < training.BYTES
    assert len(document["bars"]) == len(generation.CODECS) + len(costs) - 1
