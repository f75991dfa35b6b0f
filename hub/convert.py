"""Converts a checkpoint into a complete folder of ours: weights, code, processor, configuration.

    fastlongspeech convert Qwen/Qwen2-Audio-7B-Instruct MODEL --dtype bfloat16
    fastlongspeech convert RELEASED MODEL --ctc-model spm.model --adapter ADAPTER    # merged
    fastlongspeech convert ADAPTER MODEL-ADAPTER --base MODEL                        # kept, apart

One shard is in memory at a time. A run that was stopped goes on where it was. In the end the logits of a short
recording are compared with those of transformers' own class on the source.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from ..app.loading import find_device
from ..ctc_fastlongspeech import FastLongSpeechCTCDecoder
from .adapters import CONFIG as ADAPTER_CONFIG
from .adapters import Adapter, is_adapter
from .hosts import Host, find_host
from .joined import find_joined
from .verify import SECONDS, compare, make_inputs, our_logits, stock_logits
from .weights import StoredWeights, write_shards

RECORD = "conversion.json"
SPM = "spm.model"  # the name that the first release gave to ctc.model
HEAD = "lm_head.weight"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FETCHED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="fastlongspeech convert", description=__doc__.split("\n")[0])
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id of a checkpoint or of a LoRA adapter")
    parser.add_argument("output", type=Path, metavar="FOLDER", help="where the converted one is written")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id (default: main)")
    parser.add_argument("--adapter", metavar="SOURCE", help="LoRA adapter to merge, folder or Hub id")
    parser.add_argument("--base", metavar="MODEL", help="converted model that an adapter is for, folder or Hub id")
    parser.add_argument("--ctc-model", type=Path, metavar="FILE", help=f"SentencePiece model (default: its {SPM})")
    parser.add_argument("--processor", metavar="SOURCE", help="where tokenizer and features are (default: SOURCE)")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights written (default: the source's)")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="largest file (default: 5GB)")
    parser.add_argument("--device", help="where the logits are compared (default: a GPU if there is one)")
    arguments = parser.parse_args(argv)
    source = fetch(arguments.source, arguments.revision)
    if is_adapter(source):
        of_models = ("adapter", "ctc_model", "processor", "dtype", "device")
        if ignored := [f"--{name.replace('_', '-')}" for name in of_models if getattr(arguments, name)]:
            parser.error(f"{', '.join(ignored)}: {source} is an adapter, which is only renamed; leave them out.")
        convert_adapter(source, arguments.output, arguments.base)
        print(f"{arguments.output} holds the adapter; load it with AutoPeftModelForCausalLM.from_pretrained.")
        return
    if arguments.base:
        parser.error(f"--base is for adapters, and {source} is a whole model; leave it out.")
    record = convert(
        source,
        arguments.output,
        name=arguments.source,
        revision=arguments.revision,
        adapter=arguments.adapter,
        ctc_model=arguments.ctc_model,
        processor=arguments.processor,
        dtype=arguments.dtype,
        shard_size=arguments.shard_size,
        device=arguments.device,
    )
    print(json.dumps(record, indent=2))


def fetch(source: str, revision: str | None = None, files: Sequence[str] = FETCHED) -> Path:
    """Returns the folder of a folder or Hub id; of a Hub id, files of these names are downloaded into the cache.

    Raises:
        ValueError: there is no such folder.
    """
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ValueError(f"{source} is no folder, and can be no Hub id; give one of both.")
    return Path(snapshot_download(source, revision=revision, allow_patterns=list(files)))


def convert(
    source: Path,
    output: Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    adapter: str | None = None,
    ctc_model: Path | None = None,
    processor: str | None = None,
    dtype: str | None = None,
    shard_size: str = "5GB",
    device: str | None = None,
) -> dict[str, Any]:
    """Writes a complete folder of ours and returns its record, which is in `conversion.json` as well.

    Args:
        source: folder of a checkpoint of a host.
        output: where to; empty, absent, or of the same conversion that was stopped.
        name, revision: what the record says of the source.
        adapter: folder or Hub id of a LoRA adapter that is merged, as one that lies beside the source's weights is.
        ctc_model: the CTC decoder's SentencePiece model; by default the source's.
        processor: folder or Hub id of tokenizer and feature extractor; by default the source's.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; by default the source's.
        shard_size: of a file at most, such as `"5GB"`.
        device: where logits are compared.

    Raises:
        ValueError: the folder holds something else, names or shapes do not fit, or the logits differ.
    """
    device = find_device(device)
    fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
    host = find_host(fields.get("model_type"), str(source / "config.json"))
    stored = StoredWeights(source)
    names = {host.rename(stored_name): stored_name for stored_name in stored.shapes}
    config: Any = host.config.from_pretrained(source)
    dtype = dtype or stored.dtype
    if dtype not in DTYPES:
        raise ValueError(f"{source} has weights in {dtype}; convert those that it was made of, before quantising.")
    has_ctc = any(ours.startswith("model.ctc_decoder.") for ours in names)
    config.ctc_trained = config.ctc_trained and has_ctc
    with torch.device("meta"):
        model: Any = host.model(config)
    shapes = {ours: weight.shape for ours, weight in model.state_dict().items()}
    others = model._keys_to_ignore_on_load_unexpected or ()  # of other parts, such as a full Omni's talker
    names = {ours: name for ours, name in names.items() if not any(re.search(part, ours) for part in others)}
    joined = find_joined(model, names)
    in_parts = {part for weight in joined.values() for _, part in weight.parts}
    names = {ours: name for ours, name in names.items() if name not in in_parts}
    if config.tie_word_embeddings:
        _untie(model, config, shapes, names, stored)
    found = {ours: stored.shapes[stored_name] for ours, stored_name in names.items()}
    found |= {ours: weight.shape(stored.shapes) for ours, weight in joined.items()}
    check_names(shapes, found, has_ctc)
    beside = (source / ADAPTER_CONFIG).exists()
    if beside and adapter is not None:
        raise ValueError(
            f"{source} has an adapter of its own beside its weights, which is merged; leave out adapter={adapter!r}."
        )
    added = Adapter(source, host, shapes) if beside else None
    if adapter is not None:
        added = Adapter(fetch(adapter), host, shapes)

    settings = {"source": name or str(source), "revision": revision, "model_type": fields["model_type"]}
    settings |= {"adapter": adapter, "dtype": dtype, "shard_size": shard_size}
    _open(output, settings)
    prepared = _make_processor(host, source, processor, ctc_model, config)
    decoder = None if has_ctc else _untrained(model, config)

    def make(ours: str) -> Tensor:
        if ours in joined:
            return joined[ours].make(stored.read)
        if ours not in names:
            assert decoder is not None  # check_names
            return decoder[ours.removeprefix("model.ctc_decoder.")]
        weight = stored.read(names[ours])
        return weight if added is None else added.merge(ours, weight)

    write_shards(output, shapes, make, DTYPES[dtype], shard_size)
    prepared.save_pretrained(output)
    if (source / "generation_config.json").exists():
        GenerationConfig.from_pretrained(source).save_pretrained(output)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(output)
    config.dtype, config.architectures = dtype, [host.model.__name__]
    custom_object_save(model, output, config=config)
    config.save_pretrained(output)

    windows = prepared.windows  # a host without a mask hears what a window is padded with
    inputs = make_inputs(prepared, SECONDS if host.model.stock_mask else windows.samples / windows.sampling_rate)
    with tempfile.TemporaryDirectory() as folder:
        unmerged = None
        if added is not None and not beside:  # transformers loads one that lies beside the weights itself
            unmerged = Path(folder)
            added.save(unmerged, str(output))
        expected = stock_logits(host, source, unmerged, inputs, DTYPES[dtype], device)
    differences = compare(expected, our_logits(host, output, inputs, DTYPES[dtype], device), DTYPES[dtype])
    record = {**settings, "weights": len(shapes), "ctc_trained": config.ctc_trained, "differences": differences}
    (output / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
    return record


def convert_adapter(source: Path, output: Path, base: str | None) -> None:
    """Writes a LoRA adapter under the names of our model `base`, apart from it.

    Raises:
        ValueError: there is no `base`, the adapter does not fit it, or the output folder is not empty.
    """
    if base is None:
        raise ValueError(f"{source} is an adapter; name the converted model that it is for by --base.")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; choose another folder, or empty it.")
    folder = fetch(base, files=["config.json"])  # its weights may be large, and are not needed
    host = find_host(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"], str(folder))
    with torch.device("meta"):
        model = host.model(host.config.from_pretrained(folder))
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    Adapter(source, host, shapes).save(output, base)


def check_names(shapes: dict[str, Any], found: dict[str, Any], has_ctc: bool) -> None:
    """Raises a ValueError unless every weight of the model is in the source, and no other, in the same shape.

    Args:
        shapes: those of the model.
        found: those of the source, under our names.
        has_ctc: whether the source has a CTC decoder; a vanilla one has none.
    """
    missing = [name for name in shapes if name not in found and (has_ctc or ".ctc_decoder." not in name)]
    unknown = [name for name in found if name not in shapes]
    if missing or unknown:
        raise ValueError(
            f"the source lacks {len(missing)} weights of the model and has {len(unknown)} that it does not know: "
            f"{', '.join((missing + unknown)[:5])} ...; its config.json is of another model, or it is not whole."
        )
    for name, shape in found.items():
        if tuple(shape) != tuple(shapes[name]):
            raise ValueError(
                f"{name} has the shape {tuple(shape)} in the source, {tuple(shapes[name])} by its config.json."
            )


def _open(output: Path, settings: dict[str, Any]) -> None:
    """Makes the output folder, or finds it as the same conversion left it."""
    record = output / RECORD
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        if "differences" in before:
            raise ValueError(f"{output} already holds a finished conversion; choose another folder, or delete it.")
        if before != settings:
            raise ValueError(f"{output} holds another conversion that was begun: {before}; choose another folder.")
        return
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; choose another folder, or empty it.")
    output.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _untie(model: Any, config: Any, shapes: dict[str, Any], names: dict[str, str], stored: StoredWeights) -> None:
    """Leaves out a head that is the token embeddings; old configurations say so of heads that are not."""
    embeddings = model._tied_weights_keys[HEAD]
    if HEAD in names and not torch.equal(stored.read(names[HEAD]), stored.read(names[embeddings])):
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    else:
        del shapes[HEAD]
        names.pop(HEAD, None)


def _make_processor(host: Host, source: Path, processor: str | None, ctc_model: Path | None, config: Any) -> Any:
    """Returns the processor of the converted model; one that does not fit its configuration is a ValueError."""
    options = {}
    if ctc_model is None and (source / SPM).exists():
        ctc_model = source / SPM
    if ctc_model is not None:
        options["ctc_model"] = str(ctc_model)
    made: Any = host.processor.from_pretrained(processor or str(source), **options)
    made.target_length = config.target_length
    if config.ctc_trained and made.ctc_vocab_size != config.ctc_vocab_size:
        raise ValueError(
            f"the CTC decoder tells {config.ctc_vocab_size} pieces apart, but its SentencePiece model has "
            f"{made.ctc_vocab_size}; give the right one by --ctc-model."
        )
    if made.audio_token_id != config.audio_token_id:
        raise ValueError(
            f"the tokenizer's {made.audio_token} is {made.audio_token_id}, the model's {config.audio_token_id}; give "
            "the right one by --processor."
        )
    return made


def _untrained(model: Any, config: Any) -> dict[str, Tensor]:
    """Returns the weights of a CTC decoder that is yet to be trained, always the same."""
    torch.manual_seed(0)
    decoder = FastLongSpeechCTCDecoder(config)
    decoder.apply(model._init_weights)
    return decoder.state_dict()


if __name__ == "__main__":
    main()
