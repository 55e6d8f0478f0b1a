"""Trainer, pipelines, adapters and sentence encoders take smaller models as they do dense ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from families import BOS, EOS, FAMILIES, PAD, VOCABULARY
from torch import Tensor

import depcut
from depcut.errors import DepcutError

pytestmark = [
    pytest.mark.sweep,  # these libraries take ten seconds to import
    pytest.mark.usefixtures("zoo_libraries"),
    pytest.mark.filterwarnings("ignore"),  # what these libraries warn of is theirs
]

LLAMA, BERT = FAMILIES["Llama (GQA)"], FAMILIES["BERT"]
TEXTS = ["w5 w6 w7 w8", "w9 w10", "w11 w12 w13"]


def tokenizer() -> Any:
    """Whole words, w3 to w98."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS}
    words |= {f"w{i}": i for i in range(len(words), VOCABULARY)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return zoo.libraries()["transformers"].PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def llama() -> Any:
    return depcut.shrink(LLAMA.build(), 0.3)


@pytest.fixture(scope="module")
def bert() -> Any:
    transformers = zoo.libraries()["transformers"]
    body = BERT.build()
    return depcut.shrink(transformers.BertModel(body.config).eval(), 0.3)


@pytest.fixture(scope="module")
def ids() -> dict[str, Tensor]:
    return {"input_ids": LLAMA.inputs(2)["input_ids"]}


def logits(model: Any, ids: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**ids).logits
    return found


# Trainer ------------------------------------------------------------------------------------------


def trained(model: Any, folder: Path, **options: Any) -> Any:
    transformers = zoo.libraries()["transformers"]
    rows = [{"input_ids": row, "labels": row} for row in LLAMA.inputs(8)["input_ids"]]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, report_to=[],
        learning_rate=0.1, use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    return trainer, trainer.train(resume_from_checkpoint=options.get("resume"))


@pytest.mark.usefixtures("fresh_accelerate")
def test_trainer_trains_and_its_checkpoints_load(ids: dict[str, Tensor], tmp_path: Path) -> None:
    slim = depcut.shrink(LLAMA.build(), 0.3)
    before = logits(slim, ids)
    trainer, result = trained(slim, tmp_path, save_steps=2)
    assert result.training_loss > 0
    after = logits(slim, ids)
    assert not torch.equal(before, after)
    trainer.save_model(tmp_path / "last")
    for folder in (tmp_path / "last", tmp_path / "checkpoint-4"):
        assert torch.equal(logits(type(slim).from_pretrained(folder), ids), after)


@pytest.mark.usefixtures("fresh_accelerate")
def test_trainer_and_what_is_cut_freely(tmp_path: Path) -> None:
    slim = depcut.shrink(LLAMA.build(), 0.3, rebuildable=False)
    trained(slim, tmp_path, save_strategy="no")
    with pytest.raises(DepcutError, match=r"depcut\.save"):
        trained(slim, tmp_path, save_steps=2)


# Pipelines ----------------------------------------------------------------------------------------


def test_text_generation(llama: Any) -> None:
    words = tokenizer()
    pipeline = zoo.libraries()["transformers"].pipeline(
        "text-generation", model=llama, tokenizer=words, device="cpu"
    )
    given = {"max_new_tokens": 6, "do_sample": False}
    (made,) = pipeline(TEXTS[0], **given)
    expected = llama.generate(**words(TEXTS[0], return_tensors="pt"), **given)
    # The pipeline joins prompt and continuation without a space.
    wanted = words.decode(expected[0], skip_special_tokens=True).replace(" ", "")
    assert made["generated_text"].replace(" ", "") == wanted


def test_feature_extraction(bert: Any) -> None:
    words = tokenizer()
    pipeline = zoo.libraries()["transformers"].pipeline(
        "feature-extraction", model=bert, tokenizer=words, device="cpu"
    )
    with torch.no_grad():
        expected = bert(**words(TEXTS[0], return_tensors="pt")).last_hidden_state
    assert torch.equal(torch.tensor(pipeline(TEXTS[0])), expected)


# Sentence encoders --------------------------------------------------------------------------------


def test_a_sentence_encoder(bert: Any, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    words = tokenizer()
    for part in (bert, words):
        part.save_pretrained(tmp_path / "bert")
    encoder = library.SentenceTransformer(str(tmp_path / "bert"), device="cpu")
    batch = words(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        states = bert(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    expected = (states * mask).sum(1) / mask.sum(1)
    found = encoder.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, expected)


def test_the_model_inside_of_a_sentence_encoder(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    transformers = zoo.libraries()["transformers"]
    for part in (transformers.BertModel(BERT.build().config), tokenizer()):
        part.save_pretrained(tmp_path / "bert")
    encoder = library.SentenceTransformer(str(tmp_path / "bert"), device="cpu")
    encoder[0].model = depcut.shrink(encoder[0].model.eval(), 0.3)
    found = encoder.encode(TEXTS, convert_to_tensor=True)
    encoder.save(str(tmp_path / "encoder"))
    again = library.SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    assert torch.equal(again.encode(TEXTS, convert_to_tensor=True), found)


# Adapters -----------------------------------------------------------------------------------------


def adapted(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    chosen = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, chosen)


def step(model: Any, ids: dict[str, Tensor]) -> None:
    """Train the adapters for two steps: the first leaves half of each at zero."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(**ids, labels=ids["input_ids"]).loss.backward()
        optimizer.step()


def test_adapters_on_a_smaller_model(ids: dict[str, Tensor], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    slim = depcut.shrink(LLAMA.build(), 0.3)
    slim.save_pretrained(tmp_path / "slim")
    before = logits(slim, ids)
    model = adapted(slim)
    step(model, ids)
    after = logits(model, ids)
    assert not torch.equal(before, after)
    model.save_pretrained(tmp_path / "adapters")
    again = type(slim).from_pretrained(tmp_path / "slim")
    assert torch.equal(
        logits(peft.PeftModel.from_pretrained(again, tmp_path / "adapters"), ids), after
    )
    merged = model.merge_and_unload()
    assert type(merged) is type(slim)
    torch.testing.assert_close(logits(merged, ids), after, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = type(slim).from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again, ids), logits(merged, ids))


def test_a_model_with_adapters_shrinks_and_says_what_its_files_lack(
    ids: dict[str, Tensor], tmp_path: Path
) -> None:
    model = adapted(LLAMA.build(use_cache=False))
    step(model, ids)
    slim = depcut.shrink(model.eval(), 0.3, ids)
    assert type(slim) is type(model)
    for part in (slim, slim.get_base_model()):
        with pytest.raises(DepcutError, match=r"adapters are attached(.|\n)*merge the adapters"):
            part.save_pretrained(tmp_path / "slim")
    after = logits(slim, ids)
    merged = slim.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), after, rtol=1e-4, atol=1e-4)


def test_adapters_that_the_library_attached(ids: dict[str, Tensor], tmp_path: Path) -> None:
    """The class is that of the library, its layers are not."""
    peft = pytest.importorskip("peft")
    model: Any = LLAMA.build(use_cache=False)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for depth in (False, True):
        slim: Any = depcut.shrink(model.eval(), 0.3, ids, depth=depth)
        assert "not rebuildable from a config" in str(depcut.report(slim))
        with pytest.raises(DepcutError, match=r"adapters are attached(.|\n)*merge the adapters"):
            slim.save_pretrained(tmp_path / "slim")
        with pytest.raises(DepcutError, match="cannot be rebuilt from a config"):
            depcut.shrink(model, 0.3, ids, depth=depth, rebuildable=True)
    assert not (tmp_path / "slim").exists()
