"""The served model and its processor, as the handlers of transformers' server call them."""

import dataclasses
from typing import Any

import torch
from fastapi import HTTPException
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import Modality

from ..app.loading import load_model
from ..recordings_fastlongspeech import EncodedRecordings
from .door import VISIT, Around, HungUp, Visit
from .recordings import Recordings

# What handlers, and clients through them, may set of a prompt. `processor_kwargs`, for one, would let them name files.
PROMPT_OPTIONS = {"add_generation_prompt", "tools", "return_tensors", "return_dict", "tokenize"}
PROMPT_OPTIONS |= {"load_audio_from_video", "target_length"}
NAMED = "recording:"  # how a chat names a recording of its visit, once that is read


class HearingProcessor(Around):
    """A processor whose chats name recordings that the server has read. Any other audio is refused: the processor
    itself would open files of the server for clients."""

    compression = "iterative_fusion"

    def apply_chat_template(self, conversation: list[dict[str, Any]], **kwargs: Any) -> Any:
        """Returns the model's inputs, and with them the visit that they belong to."""
        if unknown := set(kwargs) - PROMPT_OPTIONS:
            raise HTTPException(400, f"chat_template_kwargs may hold target_length alone, got {sorted(unknown)}.")
        visit = VISIT.get(Visit())
        asked, plain = [], []
        for message in conversation:
            parts = message["content"]
            if any(self.inner.audio_token in text for text in _texts(parts)):
                raise HTTPException(
                    400, f"a text must not hold {self.inner.audio_token}, which stands for a recording."
                )
            for part in parts if isinstance(parts, list) else []:
                if part.get("type") == "audio":
                    name = str(part.get("url"))
                    if name not in visit.recordings:
                        raise HTTPException(400, "recordings are taken by /v1/chat/completions alone; send it there.")
                    asked.append(visit.recordings[name])
            plain.append({**message, "content": [_bare(part) for part in parts] if isinstance(parts, list) else parts})
        if asked:
            lengths = torch.tensor([recording.frames for recording in asked])
            none = torch.empty(0)
            kwargs["recordings"] = EncodedRecordings(none, none, none, lengths)  # of which the prompt needs no more
            kwargs.setdefault("compression", self.compression)
        inputs = self.inner.apply_chat_template(plain, **kwargs)
        inputs["visit"] = dataclasses.replace(visit, recordings={str(n): one for n, one in enumerate(asked)})
        return inputs


class HearingModel(Around):
    """A model that encodes a visit's recordings when its turn comes, and stops when the client is gone."""

    def __init__(self, inner: Any, recordings: Recordings) -> None:
        super().__init__(inner)
        self.recordings = recordings

    def generate(self, visit: Visit | None = None, **kwargs: Any) -> Tensor:
        """Returns as the model's own `generate`."""
        visit = Visit() if visit is None else visit
        if visit.gone.is_set():
            raise HungUp
        if visit.recordings:
            heard = [self.recordings.encode(one, self.inner, visit.gone) for one in visit.recordings.values()]
            kwargs["recordings"] = EncodedRecordings.cat(heard)
        criteria = StoppingCriteriaList([WhenGone(visit)])
        return self.inner.generate(**kwargs, stopping_criteria=criteria)


class WhenGone(StoppingCriteria):
    """Ends an answer that nobody waits for any more."""

    def __init__(self, visit: Visit) -> None:
        self.visit = visit

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.visit.gone.is_set(), device=input_ids.device)


class Manager(ModelManager):
    """Holds the one model that is served; requests for another are refused instead of loading it.

    Args:
        name: folder or Hub id, which is what clients ask for.
        device, dtype: as `load_model` takes them.
        recordings: the options of `Recordings`.
    """

    def __init__(self, name: str, device: str | None, dtype: str, **recordings: Any) -> None:
        super().__init__(model_timeout=-1)
        self.force_model = name  # the server's handlers then load no other
        model, processor = load_model(name, device, dtype)
        hearing = HearingProcessor(processor)
        hearing.compression = model.config.compression
        self.recordings = Recordings(processor, **recordings)
        self.served = HearingModel(model, self.recordings), hearing

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        """Returns the served model and processor; any other name is a 404."""
        check_name(self, model_id_and_revision)
        return self.served

    def process_model_name(self, model_id: str) -> str:  # type: ignore[override]  # theirs is static
        """Returns the name as it is; the served model has one revision, the one that was loaded. Others are a 404."""
        check_name(self, model_id)
        return model_id

    @staticmethod
    def get_model_modality(model: Any, processor: Any = None) -> Modality:
        return Modality.MULTIMODAL

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:  # type: ignore[override]
        """Returns the entry of the served model for `/v1/models`."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "fastlongspeech"}]


def check_name(manager: Manager, name: Any) -> None:
    """Answers 404 unless a request asks for the served model."""
    if name != manager.force_model:
        raise HTTPException(404, f"the model {name!r} is not served here; ask for {manager.force_model!r}.")


def _texts(content: Any) -> list[str]:
    return [content] if isinstance(content, str) else [part.get("text") or "" for part in content or []]


def _bare(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "audio"} if part.get("type") == "audio" else part


__all__ = ["NAMED", "HearingModel", "HearingProcessor", "Manager", "check_name"]
