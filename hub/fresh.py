"""What a stranger does with a published model, run in a process of its own that never imports this package.

    python -c "$(cat hub/fresh.py)" REPO COMMIT recording.wav logits.safetensors [BASE]

BASE is the model that an adapter is for.
"""

import sys
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForMultimodalLM, AutoProcessor

repo, commit, recording, output = sys.argv[1:5]
options: Any = {"trust_remote_code": True}
if len(sys.argv) > 5:
    from peft import AutoPeftModelForCausalLM

    processor = AutoProcessor.from_pretrained(sys.argv[5], **options)
    model = AutoPeftModelForCausalLM.from_pretrained(repo, revision=commit, dtype="auto", **options)
else:
    processor = AutoProcessor.from_pretrained(repo, revision=commit, **options)
    model = AutoModelForMultimodalLM.from_pretrained(repo, revision=commit, dtype="auto", **options)
parts = [{"type": "audio", "path": recording}, {"type": "text", "text": "What is said?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True
)
inputs["input_features"] = inputs["input_features"].to(model.dtype)
with torch.no_grad():
    logits = model.eval()(**inputs).logits[0].float()
if "fastlongspeech" in sys.modules:
    sys.exit("the package took part, so the published code was not tried")
save_file({"logits": logits}, output)
