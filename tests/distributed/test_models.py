"""Pruned models that are tensor-parallel or sharded by FSDP2, in 2 processes: the tokens and answers of one."""

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.distributed import model_cases, ranks

WORLD = 2
Errors = dict[tuple[int, str], list[str]]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Errors:
    return ranks.results("tests.distributed.model_cases", Path(tmp_path_factory.mktemp("ranks")), WORLD)


@pytest.mark.parametrize("case", model_cases.CASES)
def test_spread(errors: Errors, case: str) -> None:
    assert not errors[WORLD, case], "\n".join(errors[WORLD, case])
