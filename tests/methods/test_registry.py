"""The descriptions of methods: what follows from a function's signature, and methods that users register."""

import functools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from testing import ROOT, method_tables
from testing.pages import section
from tokenprune_kernels import methods
from tokenprune_kernels.methods import (
    ARGUMENTS,
    Method,
    Stage,
    _registry,
    get_method,
    method_names,
    register_method,
    unregister_method,
)


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = dict(_registry._METHODS)
    yield
    _registry._METHODS.clear()
    _registry._METHODS.update(before)


def first(present: Tensor, k: int) -> Tensor:
    return torch.arange(k).expand(len(present), k)


# --- the methods of the package -----------------------------------------------------------------------------------


def test_names_are_in_the_order_of_the_tables() -> None:
    published = ("coast", "sts", "adafv", "zspaprune", "adaptprune", "dart", "evs")
    published += ("vidcom2", "cdpruner", "scope", "mmtok", "pyramiddrop", "visionzip", "sparsevlm")
    published += ("vispruner", "idpruner")
    names = (*published, "fastv", "divprune", "random")
    assert method_names() == names
    assert [get_method(name).name for name in names] == list(names)
    in_model = ["coast", "sts", "adaptprune", "dart", "pyramiddrop", "sparsevlm", "fastv"]
    assert [name for name in names if get_method(name).in_model] == in_model
    assert [name for name in names if get_method(name).baseline] == ["fastv", "divprune", "random"]


def test_what_functions_are_given_and_what_is_left_to_the_user() -> None:
    """The two functions that do not get everything under its own name."""
    structure, semantics = get_method("sts").stages
    assert structure.arguments == {"features": "features", "mask": "mask", "positions": "stacked_positions"}
    own = ["exponent", "feature_weight", "position_weight", "epsilon", "first", "backend"]
    assert structure.options == dict.fromkeys(own, True)
    assert (structure.share, semantics.share, semantics.options) == (2, 1, {"backend": True})
    (adaptprune,) = get_method("adaptprune").stages
    assert adaptprune.arguments["features"] == "unrotated_key"
    assert list(adaptprune.options) == ["radius", "sigma_spatial", "sigma_semantic", "backend"]
    assert list(get_method("random").stages[0].options) == ["backend"]


def test_pages_show_what_the_descriptions_say() -> None:
    papers, page = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("methods", "transformers"))
    told = "run: python -m scripts.update_readme"
    assert section(papers, "methods") == method_tables.faithful_to(), told
    assert section(papers, "bibtex") == method_tables.bibtex(), told
    assert section(page, "where") == method_tables.where_and_by_what(), told
    assert section(page, "arguments") == method_tables.arguments(), told


def test_every_paper_has_an_entry_without_anything_guessed() -> None:
    entries = re.findall(r"@misc\{(\w+),\n(.*?)\n\}", method_tables.bibtex(), re.DOTALL)
    papers = {name: get_method(name).paper for name in method_names() if get_method(name).paper}
    assert [name for name, _ in entries] == list(papers)
    for name, fields in entries:
        known = dict(re.findall(r"(\w+) = \{(.*)\}", fields))
        assert known["eprint"] == papers[name]
        assert known.get("author", "") == get_method(name).authors
        assert (known["year"][2:], known["month"].zfill(2)) == (papers[name][:2], papers[name][2:4])
        assert set(known) <= {"title", "author", "year", "month", "eprint", "archivePrefix"}


# --- a user's -----------------------------------------------------------------------------------------------------


def test_a_registered_method_is_found_by_its_name_until_it_is_forgotten() -> None:
    made = register_method("first", first, title="First", summary="the first", paper="2601.00001", layer=3)
    assert get_method("first") is made
    assert method_names()[-1] == "first"
    assert (made.title, made.paper, made.layer) == ("First", "2601.00001", 3)
    assert (made.uses, made.in_model) == ({"present"}, False)
    with pytest.raises(ValueError, match="there is a method 'first' already; replace=True"):
        register_method("first", first)
    other = register_method("first", first, replace=True)
    assert get_method("first") is other is not made
    unregister_method("first")
    with pytest.raises(ValueError, match=r"^get_method: method must be one of coast, .*, got 'first'$"):
        get_method("first")
    with pytest.raises(ValueError, match=r"^unregister_method: "):
        unregister_method("first")


def test_a_name_that_is_almost_right_is_told() -> None:
    for name, meant in (("CoAST", "coast"), ("div_prune", "divprune"), ("SparseVLM", "sparsevlm")):
        with pytest.raises(ValueError, match=rf"got '{name}'; type '{meant}'$"):
            get_method(name)


def test_a_published_method_is_not_replaced_by_chance() -> None:
    with pytest.raises(ValueError, match="there is a method 'coast' already"):
        register_method("coast", first)


def test_a_function_is_described_by_its_signature() -> None:
    def mine(features: Tensor, query_mask: Tensor, k: int, power: float, *, sharp: bool = False) -> Tensor:
        raise NotImplementedError

    made = get_method(mine)
    assert (made.name, made.in_model) == ("mine", False)
    (stage,) = made.stages
    assert stage.arguments == {"features": "features", "query_mask": "query_mask"}
    assert stage.options == {"power": False, "sharp": True}
    assert stage.at_layer(8)
    assert not stage.at_layer(None)
    bound = Stage(functools.partial(methods.adaptprune, grid=(24, 24), radius=3.0))
    assert bound.name == "adaptprune"
    assert "grid" not in bound.arguments
    assert {"positions", "query"} < set(bound.arguments)


class Scorer(torch.nn.Module):
    def forward(self, features: Tensor, k: int) -> Tensor:
        return features.norm(dim=-1).topk(k).indices


def test_needs_are_told_where_no_signature_shows_them() -> None:
    (stage,) = register_method("scorer", Scorer(), needs=["features"]).stages
    assert (stage.name, stage.arguments, stage.options) == ("Scorer", {"features": "features"}, {})
    (stage,) = register_method("keys", lambda x, k: x, needs={"x": "key"}).stages
    assert (stage.arguments, stage.at_layer(None)) == ({"x": "key"}, True)
    (stage,) = register_method("everything", lambda k, **given: None, needs=[*ARGUMENTS]).stages
    assert stage.uses == set(ARGUMENTS)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: register_method("", first), TypeError, "name must be a str that is not empty, got ''"),
        (lambda: register_method("a", lambda features: features), TypeError, "<lambda>: the function must take k"),
        (lambda: get_method(lambda: None), TypeError, "<lambda>: the function must take k"),
        (lambda: get_method(lambda features: features), TypeError, "must take k, the number of tokens to keep"),
        (lambda: register_method("a", first, needs=["pixels"]), ValueError, "needs must be of query, .* got 'pixels'"),
        (lambda: register_method("a", first, needs={"x": "pixels"}), ValueError, "got 'pixels'"),
        (lambda: register_method("a", first, stage="tower"), ValueError, "must be model, layer or None, got 'tower'"),
        (
            lambda: register_method("a", methods.fastv, stage="model"),
            ValueError,
            "fastv: asks for key, lse, query, scale",
        ),
        (lambda: register_method("a", first, positions="new"), ValueError, "original or renumber, got 'new'"),
        (lambda: register_method("a", [Stage(first)], stage="layer"), TypeError, "with a list of Stage"),
        (lambda: register_method("a", [Stage(first)] * 2), ValueError, "one of model and one of layer, got"),
        (lambda: Stage("first"), TypeError, "the function must be callable, got str"),  # type: ignore[arg-type]
    ],
)
def test_a_description_that_cannot_work_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
    assert "a" not in method_names()


def test_a_description_is_taken_as_it_is() -> None:
    made = Method("twice", (Stage(first, "model", share=3), Stage(methods.fastv, "layer")), layer=5)
    assert get_method(made) is made
    assert made.in_model
    assert "twice" not in method_names()
