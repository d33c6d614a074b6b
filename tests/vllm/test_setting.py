"""TOKENPRUNE_VLLM: what it can say, and the errors for all else."""

import re

import pytest

from tokenprune_kernels.integrations.vllm import Setting, parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("method=divprune,keep=128", Setting("divprune", 128)),
        (" method = random , keep = 0.25 , seed = 7 ", Setting("random", 0.25, seed=7)),
        ("keep=1,method=scope,alpha=2.0,backend=cpu", Setting("scope", 1, options={"alpha": 2.0, "backend": "cpu"})),
        ("video=on", Setting(video=True)),
        ("video=on,method=divprune,keep=9", Setting("divprune", 9, video=True)),
    ],
)
def test_entries_are_read(text: str, expected: Setting) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("divprune", "an entry must be name=value, got 'divprune'"),
        ("method=divprune,,keep=3", "an entry must be name=value, got ''"),
        ("method=,keep=3", "an entry must be name=value, got 'method='"),
        ("method=divprune,keep=3,keep=4", "keep must be given once"),
        ("keep=3", "method is missing"),
        ("video=off", "method is missing"),
        ("video=on,keep=3", "method is missing"),
        ("video=maybe,method=divprune,keep=3", "video must be on or off, got 'maybe'"),
        ("method=divprune", "keep must be a number of tokens from 1 on, .* got None"),
        ("method=divprune,keep=0", "got 0"),
        ("method=divprune,keep=1.5", "got 1.5"),
        ("method=divprune,keep=0.0", "got 0.0"),
        ("method=divprune,keep=many", "got 'many'"),
        ("method=divprune,keep=True", "got True"),
        ("method=random,keep=3,seed=x", "seed must be an int, got 'x'"),
    ],
)
def test_anything_else_is_an_error_that_says_what_is_expected(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^TOKENPRUNE_VLLM: .*{message}"):
        parse(text)


def test_caches_tell_settings_apart_by_all_that_changes_the_tokens() -> None:
    settings = [
        Setting("divprune", 128), Setting("divprune", 64), Setting("random", 64), Setting("random", 64, seed=1),
        Setting("divprune", 64, options={"first": "index"}), Setting("divprune", 1), Setting("divprune", 1.0),
    ]  # fmt: skip
    identities = [setting.identity for setting in settings]
    assert len(set(identities)) == len(settings)
    assert all(re.fullmatch("[0-9a-f]{16}", identity) for identity in identities)
    one, other = (Setting("scope", 9, options=dict(items)) for items in ([("a", 1), ("b", 2)], [("b", 2), ("a", 1)]))
    assert one.identity == other.identity
    assert Setting("scope", 9, video=True).identity == Setting("scope", 9).identity
