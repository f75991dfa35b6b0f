"""Stage 2: dynamic compression training (Eq. 7): LoRA on the language model, its audio fused to a length L drawn anew.

    python -m fastlongspeech.train.dct train/recipes/dct-qwen2-audio-7b.yaml --model runs/ctc --train_data qa.jsonl
    accelerate launch -m fastlongspeech.train.dct my-recipe.yaml --learning_rate 1e-4

Rows are `audio, question, answer`. Every optimiser step draws one L, uniformly from `target_lengths`. The draw depends
on (seed, step) alone. All but the adapters is frozen. Checkpoints hold the adapter; in the end it is merged into a
complete model folder. Evaluation reports the loss at fixed lengths, as `eval_L750_loss`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, PreTrainedModel, set_seed

from ..app.hosts import Host, find_host
from ..compression_fastlongspeech import check_compression
from ..data.mixing import load_training_rows
from ..host_fastlongspeech import HostForConditionalGeneration
from .batches import DCTCollator
from .record import record_start, write_card
from .stage import (
    DTYPES,
    StageArguments,
    StageTrainer,
    export,
    open_cache,
    open_run,
    parse_settings,
    put_weights,
    trained_weights,
)

TUNINGS = ("lora", "qlora", "full")


@dataclass
class LoRAArguments(StageArguments):
    """Arguments of stages that train adapters on the language model."""

    lora_r: int = field(default=128, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=256, metadata={"help": "The adapters' output is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapters' input."})


@dataclass
class DCTArguments(LoRAArguments):
    """Arguments of stage 2."""

    tuning: str = field(
        default="lora",
        metadata={
            "help": "What trains: lora (adapters on the language model), qlora (the same on one in 4 bits) or full "
            "(the whole language model)."
        },
    )
    target_lengths: list[int] | None = field(
        default=None,
        metadata={"help": "Lengths L to draw from; config.target_lengths if not given."},
    )
    compression: str | None = field(
        default=None,
        metadata={"help": "What shortens the audio, in the saved model too; config.compression if not given."},
    )
    eval_target_lengths: list[int] | None = field(
        default=None, metadata={"help": "Lengths L to evaluate at; config.target_length if not given."}
    )


def load_model(host: Host, settings: DCTArguments, quantised: bool = False) -> Any:
    """Returns the model to start from, with the lengths and the compression of the settings in its configuration."""
    model = host.model.from_pretrained(
        settings.model,
        dtype=DTYPES[settings.dtype],
        attn_implementation=settings.attn_implementation,
        quantization_config=four_bits(settings) if quantised else None,
    )
    if settings.target_lengths:
        model.config.target_lengths = settings.target_lengths
    if settings.compression is not None:
        model.config.compression = settings.compression
    return model


def four_bits(settings: DCTArguments) -> BitsAndBytesConfig:
    """Returns how the language model's layers are quantised: nf4 twice, as QLoRA has it. All else stays whole.

    The encoder's frames and the CTC decoder's densities decide what is fused; answers do not show if they are wrong.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[settings.dtype],
        llm_int8_skip_modules=[r"model\.(?!language_model\.)", "lm_head"],
    )


def make_trainable(model: Any, settings: DCTArguments) -> Any:
    """Returns the model, or adapters around it, with what is tuned in float32; all else is frozen."""
    if settings.tuning != "full":
        return add_lora(model, settings)
    model.requires_grad_(False)
    for part in (model.model.language_model, model.lm_head):
        part.to(torch.float32).requires_grad_(True)
    return model


def add_lora(
    model: HostForConditionalGeneration, settings: LoRAArguments, modules_to_save: Sequence[str] = ()
) -> PeftModel:
    """Returns the model with adapters on q, k, v, o of every layer of its language model; all else is frozen.

    Modules with the names in `modules_to_save` train as a whole, and are saved with the adapters.
    """
    lora = LoraConfig(
        task_type="CAUSAL_LM",  # without it an adapter folder can't be loaded by AutoPeftModel
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=model.lora_targets,
        modules_to_save=list(modules_to_save) or None,
    )
    return get_peft_model(cast(PreTrainedModel, model), lora)


def main(argv: Sequence[str] | None = None, collator: type[DCTCollator] = DCTCollator) -> None:
    """Runs stage 2; `collator` may draw lengths in another way, see `compare_lengths.py`."""
    settings, training = parse_settings(DCTArguments, argv)
    for name in ("target_lengths", "eval_target_lengths"):
        if min(getattr(settings, name) or [1]) < 1:
            raise ValueError(f"{name} must be positive integers, got {getattr(settings, name)}; correct them.")
    if settings.compression is not None:
        check_compression(settings.compression)
    if settings.tuning not in TUNINGS:
        raise ValueError(f"tuning must be one of {', '.join(TUNINGS)}, got {settings.tuning!r}; choose one.")
    checkpoint = open_run(settings, training)
    columns = ("audio", "question", "answer")
    with training.main_process_first(local=False):  # it reads the headers, and the others what it remembers of them
        train_rows = load_training_rows(settings.train_data, columns)
        eval_rows = load_training_rows(settings.eval_data, columns) if settings.eval_data else None

    output = Path(str(training.output_dir))
    record_start(output, training, {"train_data": train_rows, "eval_data": eval_rows})

    host = find_host(settings.model)
    processor = host.processor.from_pretrained(settings.model)
    model = load_model(host, settings, quantised=settings.tuning == "qlora")
    config = copy.deepcopy(model.config)
    if hasattr(model.model, "ctc_decoder") and not config.ctc_trained and training.process_index == 0:
        print("# the CTC decoder is not trained, so all frames weigh the same; run stage 1 first", flush=True)
    set_seed(training.seed)
    adapted = make_trainable(model, settings)
    cache = open_cache(settings, training, model, processor)

    lengths = settings.eval_target_lengths or [config.target_length]
    trainer = StageTrainer(
        model=adapted,
        args=training,
        max_bad_share=settings.max_bad_share,
        train_dataset=train_rows,
        eval_dataset={f"L{length}": eval_rows.at(length) for length in lengths} if eval_rows else None,
        data_collator=collator(processor, config.target_lengths, training.seed, config.compression, cache),
        cache=cache,
        frames_per_batch=settings.frames_per_batch,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()

    weights = trained_weights(trainer)
    if training.should_save:
        stage = f"Its language model was trained on recordings fused to drawn lengths (stage 2, {settings.tuning})."
        write_card(output, stage, trainer.state.log_history)
        model = load_model(host, settings)  # whole, whatever precision it was trained in
        config = copy.deepcopy(model.config)
        adapted = make_trainable(model, settings)
        put_weights(adapted, weights)
        if settings.tuning == "full":
            for part in (model.model.language_model, model.lm_head):
                part.to(DTYPES[settings.dtype])
        else:
            model = adapted.merge_and_unload()
        export(model, config, processor, output)


if __name__ == "__main__":
    main()
