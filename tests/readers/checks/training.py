"""Fine-tuning an export: the Trainer's accumulation, gradient checkpointing, adapters of PEFT."""

import copy
from typing import Any

import peft
import torch
import transformers
from checks.given import Given, assert_close
from torch import Tensor

# Two to five labels, so that a mean of means is not the mean.
ANSWERS = [[310, 2], [311, 312, 313, 314, 2], [320, 321, 2], [317, 318, 319, 2]]


def accumulation(given: Given) -> None:
    """Loss and gradient norm of a step are those of its samples, in 1, 2 or 4 parts."""
    prompts = given.prompts[:4]
    batch = given.supervised(prompts, ANSWERS)
    model = given.fresh_model().train()
    loss = model(**batch).loss
    loss.backward()
    squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
    expected = torch.stack([loss.detach(), torch.stack(squares).sum().sqrt()])
    for parts in (1, 2, 4):
        found = _trained(given, prompts, parts)
        # The Trainer's log rounds to some digits.
        assert_close(found, expected, f"{parts} parts", rtol=1e-3, atol=1e-3)


def _trained(given: Given, prompts: list[dict[str, Any]], parts: int) -> Tensor:
    """Loss and gradient norm that the Trainer reports of one step."""
    samples = [{"number": number} for number in range(len(prompts))]

    def collate(chosen: list[dict[str, int]]) -> dict[str, Tensor]:
        numbers = [sample["number"] for sample in chosen]
        return given.supervised([prompts[n] for n in numbers], [ANSWERS[n] for n in numbers])

    arguments = transformers.TrainingArguments(
        output_dir=str(given.scratch / "trainer"),
        per_device_train_batch_size=len(prompts) // parts,
        gradient_accumulation_steps=parts,
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=1e9,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        given.fresh_model(), arguments, data_collator=collate, train_dataset=samples
    )
    trainer.train()
    report = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)
    return torch.tensor([float(report["loss"]), float(report["grad_norm"])])


def checkpointing(given: Given) -> None:
    """Both kinds give every parameter the gradient that it has without."""
    model = given.fresh_model().train()
    batch = given.supervised(given.prompts[:4], ANSWERS)
    plain = _gradients(model, batch)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        _compare(plain, _gradients(model, batch), f"use_reentrant={reentrant}")


def lora(given: Given) -> None:
    """Adapters train, with checkpointing too, are merged, saved and read again."""
    # A stock encoder in front of which nothing is trained gets no reentrant gradient.
    modules = r".*(q_proj|v_proj)" if not given.is_stock else r".*language_model.*(q_proj|v_proj)"
    settings = peft.LoraConfig(target_modules=modules, r=4, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(given.fresh_model(), settings).train()
    batch = given.supervised(given.prompts[:4], ANSWERS)
    plain = _gradients(model, batch)
    assert all(gradient.abs().max() > 0 for gradient in plain.values()), "an adapter is not reached"
    for reentrant in (False, True):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        _compare(plain, _gradients(model, batch), f"use_reentrant={reentrant}")
    model.gradient_checkpointing_disable()
    _step(model, batch)
    model.eval()
    _merge_and_read(given, model, batch)


def _step(model: Any, batch: dict[str, Tensor]) -> None:
    """A step of gradient descent lowers the loss."""
    before = model(**batch).loss
    before.backward()
    with torch.no_grad():
        trained = [p for p in model.parameters() if p.grad is not None]
        norm = torch.stack([p.grad.square().sum() for p in trained]).sum().sqrt()
        for parameter in trained:
            parameter -= 1e-2 * parameter.grad / norm
        assert model(**batch).loss < before


def _merge_and_read(given: Given, model: Any, batch: dict[str, Tensor]) -> None:
    batch = {name: value for name, value in batch.items() if name != "labels"}
    with torch.inference_mode():
        adapted = model(**batch).logits
    merged = copy.deepcopy(model).merge_and_unload()
    merged.save_pretrained(given.scratch / "merged")
    model.save_pretrained(given.scratch / "adapter")
    beside = peft.PeftModel.from_pretrained(given.fresh_model(), given.scratch / "adapter").eval()
    with torch.inference_mode():
        for name, reader in (
            ("merged", given.fresh_model(given.scratch / "merged")),
            ("adapter", beside),
        ):
            found = reader(**batch).logits
            # fp32: the sum of two products, or the product with a sum.
            assert_close(found, adapted, name, rtol=1e-3, atol=1e-3)
            assert not torch.allclose(found, given.model(**batch).logits, atol=1e-2)


def _gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """By name, of what is trained; zero where nothing flows."""
    model.zero_grad()
    model(**batch).loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def _compare(expected: dict[str, Tensor], found: dict[str, Tensor], what: str) -> None:
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        # The same operations run twice; fp32 sums may be grouped anew.
        assert_close(found[name], gradient, f"{what} {name}", rtol=1e-4, atol=1e-5)
