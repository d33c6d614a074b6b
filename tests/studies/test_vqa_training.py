"""Training of the small model: packed questions are answered as single ones, and a stopped run goes on as if it had
not been stopped."""

import csv

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn, which has the handwritten digits, is not installed")
pytest.importorskip("skimage", reason="scikit-image, which has the photographs, is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from studies.vqa import model as tiny
from studies.vqa import optimizer, train, words
from studies.vqa.batches import GROUND, INK, NONE, SHOWN, Batches, labels, mask, normalised
from studies.vqa.forward import answer, embed, losses
from studies.vqa.questions import FAMILIES
from studies.vqa.scene import KINDS, PATCH, scene


@pytest.fixture(scope="module")
def untrained():
    model = tiny.build()
    # Trained models are far from their start; larger weights make differences show.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model.eval()


@torch.inference_mode()
def test_packed_questions_are_answered_as_single_ones(untrained):
    batch = Batches("test", 4, 2, 120, 0)[0]
    untrained.set_attn_implementation({"text_config": "packed_questions", "vision_config": "sdpa"})
    packed = answer(untrained, embed(untrained, batch.pixels, batch.window)[:, 1:], batch, mask(batch))[0]
    untrained.set_attn_implementation("sdpa")
    seen = 0
    for sample in range(2):
        for block in batch.block[sample].unique()[1:]:
            mine = (batch.block[sample] == block).nonzero().flatten()
            tokens = torch.cat([torch.tensor([words.BOS, *[words.IMAGE] * 576]), batch.text[sample, mine]])[None]
            alone = untrained(input_ids=tokens, pixel_values=batch.pixels[sample : sample + 1]).logits[0, -len(mine) :]
            torch.testing.assert_close(packed[sample, mine], alone, atol=2e-5, rtol=1e-5)
            seen += 1
    assert seen > 10


@torch.inference_mode()
def test_windows_stand_at_their_offset_in_the_image(untrained):
    """A window's class token and tokens see positions of the whole image: moved, the same pixels are elsewhere."""
    batch = Batches("test", 2, 1, 0, 0)[0]
    here = embed(untrained, batch.pixels, batch.window)
    moved = embed(untrained, batch.pixels, (batch.window + 1) % 576)
    assert not torch.allclose(here, moved, atol=1e-3)
    rows, columns = batch.window[0] // 24, batch.window[0] % 24
    assert rows.unique().numel() == columns.unique().numel() == 12


def test_pixels_are_normalised_as_the_processor_does_it():
    drawn = scene("test", 0)
    from PIL import Image

    made = tiny.processor()(
        images=Image.fromarray(drawn.pixels), text="<image> which digit is tiny?", return_tensors="pt"
    )
    assert torch.equal(made["pixel_values"], normalised(torch.from_numpy(drawn.pixels)[None]))
    assert made["input_ids"][0, 1:577].eq(words.IMAGE).all()
    assert made["input_ids"][0].tolist()[577:] == list(words.encode("which digit is tiny?"))


def test_labels_name_what_each_token_shows():
    for seed in range(30):
        drawn = scene("train", seed)
        shown, ink, small, ground = (part.reshape(24, 24) for part in labels(drawn))
        for thing in drawn.things:
            row, column = (thing.top + thing.size // 2) // PATCH, (thing.left + thing.size // 2) // PATCH
            assert SHOWN[shown[row, column]] == thing.kind
            assert ink[row, column] == (NONE if thing.colour is None else INK.index(thing.colour))
            assert small[row, column] == (NONE if thing.colour is None else thing.tiny)
            below = [texture.kind for texture in drawn.textures if thing in drawn.on(texture)]
            assert GROUND[ground[row, column]] == (below[0] if below else "photo")
        assert len({SHOWN[s] for s in shown.ravel()} & set(KINDS)) == len({t.kind for t in drawn.things})


def test_targets_are_the_answers():
    batch = Batches("train", 3, 2, 150, 1)[0]
    asked = batch.family >= 0
    assert int(asked.sum()) > 15
    for sample, index in asked.nonzero().tolist():
        assert words.VOCABULARY[batch.text[sample, index]] == "?"
        assert batch.targets[sample, index] == batch.text[sample, index + 1]
        assert batch.targets[sample, index + 1] == words.EOS
    assert int((batch.targets != NONE).sum()) == 2 * int(asked.sum())


def test_answers_look_at_the_cells_of_their_objects():
    """A relation looks at the second object, a count at all; a question about nothing looks nowhere."""
    batch = Batches("train", 4, 2, 150, 1)[0]
    images = [scene("train", (1, 0, n)) for n in range(2)]
    seen = 0
    for sample, index in (batch.family >= 0).nonzero().tolist():
        look = batch.look[sample, index].view(24, 24)
        answer_word = words.VOCABULARY[batch.text[sample, index + 1]]
        family = list(FAMILIES)[batch.family[sample, index]]
        cells = [(r, c) for r in range(4) for c in range(4) if look[6 * r + 3, 6 * c + 3]]
        assert int(look.sum()) == 36 * len(cells)
        if family in ("relation", "tiny"):
            assert [images[sample].at(*cell).kind for cell in cells] == [answer_word]
            seen += 1
        if family == "count":
            assert len(cells) == int(answer_word)
    assert seen > 3
    assert not batch.look[batch.family < 0].any()


@torch.inference_mode()
def test_looking_is_the_attention_of_the_last_layer(untrained):
    """From the weights that eager attention returns for one single question."""
    batch = Batches("test", 4, 1, 20, 3)[0]
    untrained.set_attn_implementation({"text_config": "packed_questions", "vision_config": "sdpa"})
    visual = embed(untrained, batch.pixels, batch.window)[:, 1:]
    _, look = answer(untrained, visual, batch, mask(batch))
    expected = []
    for block in batch.block[0].unique()[1:]:
        mine = (batch.block[0] == block).nonzero().flatten()
        index = int(mine[0]) + int((batch.family[0, mine] >= 0).nonzero())
        if not batch.look[0, index].any():
            continue
        asked = batch.text[0, int(mine[0]) : index + 1]
        tokens = torch.cat([torch.tensor([words.BOS, *[words.IMAGE] * 576]), asked])[None]
        untrained.set_attn_implementation("eager")
        weights = untrained(input_ids=tokens, pixel_values=batch.pixels, output_attentions=True).attentions[-1][
            0, :, -1
        ]
        untrained.set_attn_implementation("sdpa")
        image = weights[:, 1:577]
        share = (image * batch.look[0, index]).sum(-1) / image.sum(-1)
        expected.append(-share.mean().log())
    assert expected
    torch.testing.assert_close(look, torch.stack(expected).mean(), atol=1e-4, rtol=1e-4)


def test_batches_do_not_depend_on_who_draws_them():
    a, b = Batches("train", 2, 3, 60, 0)[5], Batches("train", 2, 3, 60, 0)[5]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a.pixels, Batches("train", 2, 3, 60, 1)[5].pixels)


def test_ease_fades():
    data = Batches("train", 1, 1, 0, 0, easy=(10, 20))
    assert [data.ease(n) for n in (0, 10, 15, 20, 30)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert Batches("train", 1, 1, 0, 0).ease(0) == 0.0


@pytest.mark.parametrize("shape", [(3, 20, 20), (2, 8, 40), (2, 40, 8), (1, 1, 5)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(optimizer.orthogonalised(torch.randn(shape)))
    assert values.min() > 0.3
    assert values.max() < 1.4


def test_muon_step_is_the_library_s_but_in_float32():
    """torch's own Muon rounds to bfloat16 on the way."""
    torch.manual_seed(0)
    weight, gradient = torch.randn(16, 48), torch.randn(16, 48)
    ours, theirs = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    mine = optimizer.Muon([ours], lr=0.1, weight_decay=0.01)
    library = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        library.step()
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


def test_losses_have_gradients_everywhere_they_should():
    model = tiny.build()
    model.set_attn_implementation({"text_config": "packed_questions", "vision_config": "sdpa"})
    parts, right = losses(model, Batches("train", 2, 2, 60, 0)[0])
    parts.total().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    # CLIP's norm of the pooled class token is behind what LLaVA reads.
    assert all("post_layernorm" in name for name in without), without
    assert right.dtype == torch.bool
    assert all(torch.isfinite(part) for part in parts)


@pytest.fixture
def short(monkeypatch):
    stages = (
        train.Stage(cells=1, text=0, batch=2, steps=4, easy=(1, 3)),
        train.Stage(cells=2, text=40, batch=2, steps=6),
    )
    monkeypatch.setattr(train, "STAGES", stages)
    monkeypatch.setattr(train, "EVERY", 2)
    monkeypatch.setattr(train, "SAVE", 0)


def test_stopped_training_goes_on_as_if_it_had_not_been_stopped(short, tmp_path, monkeypatch):
    """Stopped in the middle of the second stage, one step after a checkpoint."""
    whole = train.Trainer(tmp_path / "whole")
    whole.run(workers=0)

    class StopError(Exception):
        pass

    first = train.Trainer(tmp_path / "parts")
    update = first._update

    def stopping(batch):
        if (first.stage, first.step) == (1, 5):
            raise StopError
        return update(batch)

    monkeypatch.setattr(first, "_update", stopping)
    with pytest.raises(StopError):
        first.run(workers=0)
    second = train.Trainer(tmp_path / "parts")
    assert (second.stage, second.step) == (1, 4)
    second.run(workers=0)
    for (name, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name

    def rows(folder):
        with (tmp_path / folder / "training.csv").open() as file:
            return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]

    assert rows("whole") == rows("parts")
    assert [(row["stage"], row["step"]) for row in rows("whole")] == [
        ("0", "2"),
        ("0", "4"),
        ("1", "2"),
        ("1", "4"),
        ("1", "6"),
    ]


def test_rate_warms_up_and_ends_at_zero():
    last = len(train.STAGES) - 1
    assert train.rate(0, 0) == pytest.approx(train.RATE / train.WARMUP)
    assert train.rate(0, train.WARMUP) == pytest.approx(train.RATE)
    falling = [train.rate(last, step) for step in range(train.STAGES[last].steps)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < train.RATE / 500


def test_saved_model_is_read_by_transformers(untrained, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    tiny.save(untrained, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 16 << 20
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    message = [{"type": "image", "image": np.zeros((336, 336, 3), np.uint8)}, {"type": "text", "text": "is there a 5?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["input_ids"][0].tolist() == [words.BOS, *[words.IMAGE] * 576, *words.encode("is there a 5?")]
    for (name, a), b in zip(untrained.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a.half().float(), b, msg=name)
