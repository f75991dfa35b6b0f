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
from typing import cast

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed

from ..app.hosts import find_host
from ..compression_fastlongspeech import check_compression
from ..data.mixing import load_training_rows
from ..host_fastlongspeech import HostForConditionalGeneration
from .batches import DCTCollator
from .stage import DTYPES, StageArguments, StageTrainer, export, open_cache, open_run, parse_settings


@dataclass
class LoRAArguments(StageArguments):
    """Arguments of stages that train adapters on the language model."""

    lora_r: int = field(default=128, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=256, metadata={"help": "The adapters' output is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapters' input."})


@dataclass
class DCTArguments(LoRAArguments):
    """Arguments of stage 2."""

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


def main(argv: Sequence[str] | None = None) -> None:
    """Runs stage 2."""
    settings, training = parse_settings(DCTArguments, argv)
    for name in ("target_lengths", "eval_target_lengths"):
        if min(getattr(settings, name) or [1]) < 1:
            raise ValueError(f"{name} must be positive integers, got {getattr(settings, name)}; correct them.")
    if settings.compression is not None:
        check_compression(settings.compression)
    checkpoint = open_run(settings, training)
    columns = ("audio", "question", "answer")
    with training.main_process_first(local=False):  # it reads the headers, and the others what it remembers of them
        train_rows = load_training_rows(settings.train_data, columns)
        eval_rows = load_training_rows(settings.eval_data, columns) if settings.eval_data else None

    host = find_host(settings.model)
    processor = host.processor.from_pretrained(settings.model)
    model = host.model.from_pretrained(settings.model, dtype=DTYPES[settings.dtype])
    if settings.target_lengths:
        model.config.target_lengths = settings.target_lengths
    if settings.compression is not None:
        model.config.compression = settings.compression
    config = copy.deepcopy(model.config)
    if not config.ctc_trained and training.process_index == 0:
        print("# the CTC decoder is not trained, so all frames weigh the same; run stage 1 first", flush=True)
    set_seed(training.seed)
    adapted = add_lora(model, settings)
    cache = open_cache(settings, training, model, processor)

    lengths = settings.eval_target_lengths or [config.target_length]
    trainer = StageTrainer(
        model=adapted,
        args=training,
        max_bad_share=settings.max_bad_share,
        train_dataset=train_rows,
        eval_dataset={f"L{length}": eval_rows.at(length) for length in lengths} if eval_rows else None,
        data_collator=DCTCollator(processor, config.target_lengths, training.seed, config.compression, cache),
        cache=cache,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()

    if training.should_save:
        export(adapted.merge_and_unload(), config, processor, Path(str(training.output_dir)))


if __name__ == "__main__":
    main()
