"""The cluster file: what it means, and a sentence for everything that cannot be."""

from __future__ import annotations

import json
import tomllib

import pytest

from helixnet.core.errors import UsageError
from helixnet.core.types import PeerId
from helixnet.planner.catalogue import GPUS, find_gpu, roofline
from helixnet.planner.cluster import CATALOGUE, GIVEN, MEASURED, Cluster, build, manifest_of
from helixnet.planner.cluster_file import ModelEntry, change, parse

MODEL = '[model]\nname = "llama-3.1-8b"\n'
PEER = '[[peers]]\nname = "a"\ngpu = "rtx4090"\n'
LINKS = "[links]\ndefault = { round_trip_ms = 10, mbit = 80 }\n"
OTHER = '[[peers]]\nname = "b"\nregion = "far"\n'
GOOD = MODEL + PEER + OTHER + 'gpu = "T4"\n' + LINKS


def cluster(text: str) -> Cluster:
    return build(parse(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("model = [", "not valid TOML", id="not-toml"),
        pytest.param(PEER, "says no model", id="no-model"),
        pytest.param(MODEL, "has no peers", id="no-peers"),
        pytest.param("speed = 1\n" + GOOD, "unknown key 'speed'", id="unknown-table"),
        pytest.param(MODEL + PEER + "memry_gb = 4\n", "peer 'a'.*unknown field `memry_gb`", id="unknown-key"),
        pytest.param(MODEL + PEER + 'count = "two"\n', "Expected `int`", id="wrong-type"),
        pytest.param('[model]\nname = "mine"\n' + PEER, "layers, hidden_size.* must be given", id="unknown-model"),
        pytest.param(MODEL + "layers = 0\n" + PEER, "1 to 1024 layers, not 0", id="no-layers"),
        pytest.param(MODEL + "layer_mb = nan\n" + PEER, "layer_mb must be a number above 0", id="nan-layer"),
        pytest.param(MODEL + 'dtype = "int4"\n' + PEER, "dtype is one of", id="unknown-dtype"),
        pytest.param(MODEL + PEER + PEER, "Two peers are called 'a'", id="same-name"),
        pytest.param(MODEL + PEER + "count = 2\n" + PEER.replace('"a"', '"a-2"'), "called 'a-2'", id="same-in-group"),
        pytest.param(MODEL + PEER.replace('"a"', '"clients"'), "A peer's name", id="reserved-name"),
        pytest.param(MODEL + PEER + "count = 0\n", "count of peer 'a'", id="count-of-none"),
        pytest.param(MODEL + PEER + "count = 1025\n", "count of peer 'a' is 1 to 1024", id="too-many"),
        pytest.param(MODEL + PEER.replace("4090", "4091"), "Did you mean rtx4090", id="unknown-gpu"),
        pytest.param(MODEL + '[[peers]]\nname = "a"\nmemory_gb = 4\n', "how fast", id="no-rates"),
        pytest.param(
            MODEL + '[[peers]]\nname = "a"\ntflops = 1\nbandwidth_gb = 1\n', "how much memory", id="no-memory"
        ),
        pytest.param(MODEL + PEER + "tflops = 0\nbandwidth_gb = 9\n", "tflops of peer 'a' must be", id="zero-rate"),
        pytest.param(MODEL + PEER + "tflops = 9\n", "only one of tflops", id="half-of-the-rates"),
        pytest.param(MODEL + PEER + "decode = [[1, 0.1]]\n", "only one of decode", id="half-of-the-curves"),
        pytest.param(
            MODEL + PEER + "decode = [[4, 0.1], [1, 0.1]]\nprefill = [[9, 0.1]]\n", "ascending", id="falling-curve"
        ),
        pytest.param(MODEL + PEER + "memory_gb = inf\n", "memory_gb of peer 'a' must be", id="endless-memory"),
        pytest.param(MODEL + "[workload]\nprompt_tokens = 0\n" + PEER, "at least 1", id="no-prompt"),
        pytest.param(MODEL + "[workload]\nprompt_tokens = 200000\n" + PEER, "does not fit", id="long-prompt"),
        pytest.param(GOOD.replace("mbit = 80", "mbit = 0"), "default link must be a number above 0", id="zero-link"),
        pytest.param(GOOD.replace("ms = 10", "ms = nan"), "round_trip_ms of 0 or more", id="nan-round-trip"),
        pytest.param(GOOD.replace(LINKS, ""), "joins region 'here' with region 'far'", id="disconnected"),
        pytest.param(MODEL + PEER + "count = 2\n", "both in region 'here'", id="disconnected-inside"),
        pytest.param(
            GOOD + '[[links.peers]]\nbetween = ["a", "x"]\nround_trip_ms = 1\nmbit = 1\n', "'x'", id="link-to-nobody"
        ),
    ],
)
def test_what_cannot_be_gets_a_sentence(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        cluster(text)


def test_toml_and_json_mean_the_same() -> None:
    assert build(parse(json.dumps(tomllib.loads(GOOD)), is_json=True)) == cluster(GOOD)


def test_json_may_not_smuggle_a_nan() -> None:
    text = '{"model": {"name": "llama-3.1-8b"}, "peers": [{"name": "a", "gpu": "t4", "memory_gb": NaN}]}'
    with pytest.raises(UsageError, match="memory_gb"):
        parse(text, is_json=True)


def test_the_more_particular_link_counts_and_ways_may_differ() -> None:
    near = '[[links.peers]]\nbetween = ["a", "b"]\nround_trip_ms = 2\nmbit = 8\nback_mbit = 4\n'
    links = {(link.source, link.target): link for link in cluster(GOOD + near).snapshot.links}
    there, back = links[PeerId("a"), PeerId("b")], links[PeerId("b"), PeerId("a")]
    assert (there.round_trip_s, there.bandwidth, back.bandwidth) == (0.002, 1e6, 5e5)


def test_rates_say_where_they_come_from() -> None:
    given, timed = "tflops = 9\nbandwidth_gb = 90\n", "decode = [[1, 0.1]]\nprefill = [[9, 0.1]]\n"
    one = MODEL + PEER
    assert [cluster(one + more).rates[PeerId("a")] for more in ("", given, timed)] == [CATALOGUE, GIVEN, MEASURED]


def test_the_shape_of_a_known_model_gives_its_size() -> None:
    manifest = manifest_of(ModelEntry(name="llama-3.1-70b"))
    assert manifest.span_bytes(0, 80) / 2 == pytest.approx(70.6e9, rel=0.01)


def test_every_device_of_the_catalogue_has_rates_that_a_plan_can_use() -> None:
    manifest = manifest_of(ModelEntry(name="llama-3.1-8b"))
    for key, gpu in GPUS.items():
        assert find_gpu(key) is gpu
        curve = roofline(gpu, manifest).decode
        assert [point.seconds for point in curve] == sorted(point.seconds for point in curve)
    assert find_gpu("NVIDIA GeForce RTX 4090") is GPUS["rtx4090"]


def test_peers_come_and_go_by_name_and_group() -> None:
    group = parse(GOOD.replace('"rtx4090"\n', '"rtx4090"\ncount = 3\n'))
    assert change(group, ["t4@far", "t4@far"], ["a-2"]).names() == ["a-1", "a-3", "b", "t4", "t4-2"]
    assert change(group, [], ["a"]).names() == ["b"]
    with pytest.raises(UsageError, match="no peer 'x' to remove"):
        change(group, [], ["x"])
    with pytest.raises(UsageError, match="leaves nobody"):
        change(group, [], ["a", "b"])
