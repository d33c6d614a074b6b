"""`save_html`: one file that needs no other, with what the methods kept and the order in which they did."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("jinja2", reason="jinja2 is not installed")

from tests.transformers.vlm.models import Prompts, llava
from tests.transformers.vlm.runs_crops import prompts_of
from tokenprune_kernels.integrations.transformers import prune_visual_tokens
from tokenprune_kernels.methods import Selection

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
# Elements of HTML without an end tag.
VOID = {"meta", "input", "img", "br", "hr", "link"}


def refused(constant: str) -> None:
    raise ValueError(f"no browser reads {constant}")


class Page(HTMLParser):
    """Elements in order, as (name, attributes, text); every one must be ended, the last begun first."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []
        names = [attributes["id"] for _, attributes, _ in self.elements if "id" in attributes]
        assert len(set(names)) == len(names)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        element = (tag, {name: value or "" for name, value in attrs}, [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> ends nothing"
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.open[-1][2].append(data)

    def all(self, tag: str, **wanted: str) -> list[tuple[dict[str, str], str]]:
        return [
            (attributes, "".join(text))
            for name, attributes, text in self.elements
            if name == tag and all(attributes.get(n) == v for n, v in wanted.items())
        ]

    def data(self) -> Any:
        ((_, text),) = self.all("script", type="application/json")
        return json.loads(text, parse_constant=refused)

    def cells(self) -> list[dict[str, str]]:
        return [attributes for attributes, _ in self.all("rect") if "data-token" in attributes]

    def bright(self) -> list[int]:
        return [int(cell["data-token"]) for cell in self.cells() if "on" in cell.get("class", "").split()]


def forward(prompts: Prompts) -> None:
    with torch.no_grad():
        prompts.model(**prompts.inputs)


def blocks_of(prompts: Prompts, *methods: Any, keep: int = 9) -> list[Any]:
    blocks = []
    for method in methods:
        with prune_visual_tokens(prompts.model, method, keep) as pruning:
            forward(prompts)
        blocks.append(pruning)
    return blocks


def boxes_in(page: Page) -> torch.Tensor:
    """Of the bright cells, as `boxes()` has them."""
    cells = [[float(cell[n]) for n in ("x", "y", "width", "height")] for cell in page.cells() if "class" in cell]
    left, top, width, height = torch.tensor(cells).unbind(1)
    return torch.stack([left, top, left + width, top + height], 1)


@pytest.fixture(scope="module")
def shown() -> list[Any]:
    """divprune picks one after the other, fastv scores, visionzip tells neither, and coast several scores."""
    return blocks_of(llava(2, ragged=True, images=2), "divprune", "fastv", "visionzip", "coast")


IMAGE = Image.new("RGB", (120, 60), (200, 100, 40))


def written(path: Path, blocks: list[Any], image: Any = IMAGE, **more: Any) -> Page:
    first, *others = blocks
    first.save_html(path / "page.html", image, others=others, **more)
    return Page((path / "page.html").read_text(encoding="utf-8"))


def test_the_page_is_whole_and_asks_for_nothing_from_elsewhere(shown: list[Any], tmp_path: Path) -> None:
    page = written(tmp_path, shown)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    text = re.sub(r"base64,[\w+/=]+", "", text)
    assert text.startswith("<!doctype html>")
    assert not re.search(r"https?:|//[a-z]|@import|\bfetch\b|XMLHttpRequest", text)
    assert {name for name, _, _ in page.elements}.isdisjoint({"link", "iframe", "object", "base"})
    for name, attributes, _ in page.elements:
        for attribute in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(attribute, "data:").startswith("data:"), name
    for reference in re.findall(r"url\(([^)]*)\)", text):
        assert page.all("mask", id=reference.removeprefix("#"))
    ((policy, _),) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'; img-src data:;")


def test_the_page_can_be_read_and_used_without_a_pointer(shown: list[Any], tmp_path: Path) -> None:
    page = written(tmp_path, shown)
    assert page.all("html", lang="en")
    ((_, title),) = page.all("title")
    ((_, heading),) = page.all("h1")
    assert title == heading == "Visual tokens kept by DivPrune, FastV, VisionZip, COAST"
    labelled = {attributes.get("for") for attributes, _ in page.all("label")}
    assert {"order", "step"} <= labelled
    assert len(page.all("input", type="radio", name="method")) == 4
    assert [attributes for attributes, _ in page.all("input", type="radio") if "checked" in attributes] == [
        {"type": "radio", "name": "method", "value": "0", "checked": ""}
    ]
    ((said, text),) = page.all("output", id="said")
    assert said["aria-live"] == "polite"
    assert text == f"{len(shown[0].kept[0])} of {len(shown[0].kept[0])} kept tokens, 72 in the prompt"
    assert all(attributes["alt"] for attributes, _ in page.all("img"))


def test_the_page_shows_what_the_first_method_kept(shown: list[Any], tmp_path: Path) -> None:
    for image_index in (0, 1):
        page = written(tmp_path, shown, sample=1, image_index=image_index)
        assert len(page.cells()) == 36
        kept = [k for k in shown[0].kept[1].tolist() if k // 36 == image_index]
        assert page.bright() == kept
        boxes = shown[0].boxes(sample=1, image_index=image_index)
        torch.testing.assert_close(boxes_in(page), boxes, rtol=0, atol=3e-6)
        ((picture, _),) = page.all("img")
        with Image.open(io.BytesIO(base64.b64decode(picture["src"].partition(",")[2]))) as image:
            assert image.size == IMAGE.size == (int(picture["width"]), int(picture["height"]))
            assert max(abs(a - b) for a, b in zip(image.getpixel((60, 30)), (200, 100, 40), strict=True)) <= 3


def test_the_numbers_are_those_of_the_blocks(shown: list[Any], tmp_path: Path) -> None:
    data = written(tmp_path, shown, sample=1).data()
    assert data["total"] == 72
    for block, method in zip(shown, data["methods"], strict=True):
        kept = block.kept[1].tolist()
        assert method["title"] == block.title
        assert method["kept"] == kept
        assert method["layers"] == block.stats["layers"]
        for order in method["orders"]:
            assert sorted(token for step in order["steps"] for token in step) == kept
        (told,) = block.saved.values()
        assert set(method["scores"]) == set(told)
        for name, values in told.items():
            if name == "rank":
                expected = [None if rank < 0 else rank + 1 for rank in values[1].tolist()]
                assert method["scores"][name] == expected
            else:
                assert method["scores"][name] == pytest.approx(values[1].tolist(), rel=1e-5)
    by_rank, by_score, by_nothing, by_several = (method["orders"] for method in data["methods"])
    rank = shown[0].saved[0]["rank"][1]
    assert [order["name"] for order in by_rank] == ["order of selection"]
    assert [token for (token,) in by_rank[0]["steps"]] == sorted(shown[0].kept[1].tolist(), key=lambda t: rank[t])
    attention = shown[1].saved[2]["attention"][1]
    assert [order["name"] for order in by_score] == ["attention, high to low"]
    assert [token for (token,) in by_score[0]["steps"]] == sorted(
        shown[1].kept[1].tolist(), key=lambda t: -attention[t]
    )
    assert by_nothing == [{"name": "dropped, then kept", "steps": [shown[2].kept[1].tolist()]}]
    assert [order["name"] for order in by_several] == [f"{n}, high to low" for n in ("global", "last", "contrast")]


def test_an_order_of_selection_comes_first_and_tokens_without_a_number_last() -> None:
    prompts = llava(1)
    with prune_visual_tokens(prompts.model, "sts", 9) as pruning:
        forward(prompts)
    from tokenprune_kernels.integrations.transformers.page import Choice, orders_of

    kept = pruning.kept[0].tolist()
    saved = {layer: {name: values[0] for name, values in told.items()} for layer, told in pruning.saved.items()}
    first, second = orders_of(Choice("STS", kept, [0, 2], saved))
    rank = pruning.saved[0]["rank"][0]
    assert first["name"] == "order of selection in front of layer 0"
    assert first["steps"] == [[token] for token in sorted(kept, key=lambda t: rank[t])]
    assert second["name"] == "attention, high to low in front of layer 2"
    unknown = {2: {"score": torch.where(torch.arange(36) == kept[3], torch.nan, torch.arange(36.0))}}
    (order,) = orders_of(Choice("own", kept, [2], unknown))
    assert order["steps"] == [[t] for t in reversed(kept) if t != kept[3]] + [[kept[3]]]


def test_several_images_and_overlapping_crops(tmp_path: Path) -> None:
    prompts = prompts_of("llava_next", "several")
    blocks = blocks_of(prompts, "divprune")
    images = [IMAGE, IMAGE.resize((50, 50))]
    sample = next(b for b in range(2) if len(blocks[0]._block.report.layout().images[b].unique()) == 2)
    page = written(tmp_path, blocks, images, sample=sample)
    assert len(page.all("figure")) == len(page.all("mask")) == 2
    boxes = [blocks[0].boxes(sample=sample, image_index=n) for n in range(2)]
    torch.testing.assert_close(boxes_in(page), torch.cat(boxes), rtol=0, atol=3e-6)
    assert [(a["width"], a["height"]) for a, _ in page.all("img")] == [("120", "60"), ("50", "50")]


def test_large_images_are_made_smaller_and_the_users_is_left_alone(tmp_path: Path) -> None:
    image = Image.new("RGB", (3000, 1500))
    page = written(tmp_path, blocks_of(llava(1), "fastv"), image)
    ((picture, _),) = page.all("img")
    assert (picture["width"], picture["height"]) == ("1024", "512")
    assert image.size == (3000, 1500)


def test_names_of_methods_are_text(tmp_path: Path) -> None:
    def method(features: Any, k: int) -> Selection:
        indices = torch.arange(k).expand(len(features), -1)
        return Selection(indices, torch.full((len(features),), k), {"</script><b>": features[..., 0].float()})

    method.__name__ = name = "</script><b>&amp;'\""
    page = written(tmp_path, blocks_of(llava(1), method))
    ((_, title),) = page.all("title")
    assert title.endswith(name)
    assert page.data()["methods"][0]["title"] == name
    assert page.data()["methods"][0]["orders"][0]["name"] == "</script><b>, high to low"
    assert page.all("b") == []


def test_numbers_that_are_not_finite_leave_the_page_readable(tmp_path: Path) -> None:
    def method(features: Any, k: int) -> Selection:
        score = torch.arange(features.shape[1]).float().expand(len(features), -1).clone()
        score[:, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
        indices = torch.arange(k).expand(len(features), -1)
        return Selection(indices, torch.full((len(features),), k), {"score": score})

    (told,) = written(tmp_path, blocks_of(llava(1), method)).data()["methods"]
    assert told["scores"]["score"][:4] == ["inf", "-inf", None, 3.0]
    assert told["orders"][0]["steps"] == [[t] for t in (0, 8, 7, 6, 5, 4, 3, 1)] + [[2]]


def test_blocks_of_other_prompts_are_refused(tmp_path: Path) -> None:
    (one,), (two,) = blocks_of(llava(1), "fastv"), blocks_of(llava(1, images=2), "divprune")
    with pytest.raises(ValueError, match=r"pruned the same prompt; DivPrune had visual tokens \[72\] and FastV \[36\]"):
        written(tmp_path, [one, two])
    with (
        prune_visual_tokens(llava().model, "fastv", 9) as pruning,
        pytest.raises(RuntimeError, match="nothing was pruned"),
    ):
        written(tmp_path, [pruning])


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of(llava(1), "fastv")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"needs jinja2, run: pip install 'tokenprune_kernels\[html\]'"):
        written(tmp_path, blocks)


# --- in a browser -----------------------------------------------------------------------------------------------------


def rendered(path: Path, state: str) -> Page:
    """The elements after the scripts ran, with that part of the address."""
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom",
        f"--user-data-dir={path.parent / 'profile'}", f"{path.as_uri()}#{state}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return Page(done.stdout)


@pytest.mark.skipif(BROWSER is None, reason=f"no headless browser here, looked for {', '.join(BROWSERS)}")
def test_slider_and_switch_in_a_browser(shown: list[Any], tmp_path: Path) -> None:
    data = written(tmp_path, shown).data()
    path = tmp_path / "page.html"
    for method, order, step in ((0, 0, 3), (2, 0, 1), (3, 2, 4)):
        page = rendered(path, f"method={method}&order={order}&step={step}")
        of_method = data["methods"][method]
        shown_tokens = sorted(token for each in of_method["orders"][order]["steps"][:step] for token in each)
        assert page.bright() == [token for token in shown_tokens if token < 36]
        ((_, said),) = page.all("output", id="said")
        assert said == f"{len(shown_tokens)} of {len(of_method['kept'])} kept tokens, 72 in the prompt"
        ((slider, _),) = page.all("input", id="step")
        assert slider["max"] == str(len(of_method["orders"][order]["steps"]))
        assert [text for _, text in page.all("option")] == [each["name"] for each in of_method["orders"]]
    page = rendered(path, "method=99&order=9&step=x")  # as near as there is
    assert page.bright() == []
    ((_, said),) = page.all("output", id="said")
    assert said == f"0 of {len(data['methods'][3]['kept'])} kept tokens, 72 in the prompt"
