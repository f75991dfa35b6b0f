"""The manifests that the training stages read of the small model's corpus."""

import json

from conftest import write_rows

from fastlongspeech.small import manifests


def test_every_stage_gets_the_rows_that_it_can_learn_from(tmp_path):
    clip = {"audio": "a.opus", "duration": 4.0, "text": "It was 1945.", "source": "kathleen"}
    shouted = {"audio": "b.opus", "duration": 5.0, "text": "A MAN RAN", "labels": "a man ran"}
    passage = {"audio": "c.opus", "duration": 60.0, "text": "Long.", "labels": "long"}
    tasks = [
        {"task": "question", "audio": "c.opus", "question": "Who?", "answer": "Anna"},
        {"task": "transcribe", "audio": "c.opus", "start": 0.0, "end": 9.0, "question": "Write.", "answer": "Long."},
        {"task": "text", "passage": "Long.", "question": "Who?", "answer": "Anna"},
        *({"task": "repeat", "audio": f"{n}.opus", "question": "Repeat.", "answer": "A MAN RAN"} for n in range(400)),
    ]
    for split in ("train", "val"):
        write_rows(tmp_path / f"{split}.jsonl", [clip, shouted, passage])
        write_rows(tmp_path / f"tasks-{split}.jsonl", tasks)
    manifests.main([str(tmp_path)])

    def rows(name: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]

    assert rows("ctc-train") == rows("ctc-val") == [{"audio": "b.opus", "text": "a man ran"}]
    assert [row["text"] for row in rows("align-train")] == ["It was 1945.", "a man ran"]
    asked = rows("qa-train")
    assert asked[0] == {"audio": "c.opus", "question": "Who?", "answer": "Anna"}
    assert {row["answer"] for row in asked[1:]} == {"a man ran"} and 60 < len(asked) < 140  # one in four
