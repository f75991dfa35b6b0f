"""The judge and the building of LongSpeech-Eval, against a small server here that speaks OpenAI's protocol."""

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile

from fastlongspeech.app import cli
from fastlongspeech.data.tasks import load_questions
from fastlongspeech.evaluation import chat as chat_module
from fastlongspeech.evaluation import longspeech_eval, run
from fastlongspeech.evaluation.chat import Chat, PromptRefused, fill, find_object
from fastlongspeech.evaluation.journal import read_journal
from fastlongspeech.evaluation.judge import RUBRIC, judge, parse_score, read_template

Reply = Callable[[str], "str | int"]


class Endpoint:
    """A server whose `reply` to a prompt is a text, or the number of an HTTP error; it keeps all requests."""

    def __init__(self) -> None:
        self.reply: Reply = lambda prompt: "hello"
        self.requests: list[dict[str, Any]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append(request | {"path": self.path, "key": self.headers["Authorization"]})
                reply = endpoint.reply(request["messages"][0]["content"])
                status = reply if isinstance(reply, int) else 200
                message = {"role": "assistant", "content": reply}
                body: dict[str, Any] = {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 0,
                    "model": request["model"],
                }
                body["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
                content = json.dumps(body if status == 200 else {"error": {"message": "no"}}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.0)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.0)
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


# The endpoint


def test_a_prompt_is_asked_at_temperature_zero(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert Chat("judge-7b", endpoint.url).reply("Hi?") == "hello"
    (request,) = endpoint.requests
    assert request["path"] == "/v1/chat/completions" and request["key"] == "Bearer secret"
    assert request["model"] == "judge-7b" and request["temperature"] == 0
    assert request["messages"] == [{"role": "user", "content": "Hi?"}]


def test_model_and_endpoint_come_from_the_environment_too(endpoint, monkeypatch):
    with pytest.raises(ValueError, match="set OPENAI_MODEL"):
        Chat(base_url=endpoint.url)
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        Chat("gpt")
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
    monkeypatch.setenv("OPENAI_MODEL", "llama")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    Chat().reply("?")
    assert (endpoint.requests[0]["model"], endpoint.requests[0]["key"]) == ("llama", "Bearer k")


def test_failures_are_tried_again_and_refusals_are_not(endpoint):
    replies = iter([500, 429, "at last"])
    endpoint.reply = lambda prompt: next(replies)
    assert Chat("m", endpoint.url).reply("?") == "at last"
    endpoint.reply = lambda prompt: 400
    with pytest.raises(PromptRefused, match="refused a prompt of 1 characters"):
        Chat("m", endpoint.url).reply("?")
    assert len(endpoint.requests) == 4
    endpoint.reply = lambda prompt: 503
    with pytest.raises(ValueError, match="run the same command again"):
        Chat("m", endpoint.url).reply("?")
    assert len(endpoint.requests) == 4 + 1 + chat_module.RETRIES
    endpoint.reply = lambda prompt: 401
    with pytest.raises(ValueError, match="set OPENAI_API_KEY in the environment .* run the same command"):
        Chat("m", endpoint.url).reply("?")


def test_prompts_are_filled_once():
    assert fill('{a} {b} {"c": {a}}', a="{b}", b="2") == '{b} 2 {"c": {b}}'


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ('```json\n{"score": 4}\n```', {"score": 4}),
        ('First {"score": 1}, no: {"score": {"x": 2}}', {"score": {"x": 2}}),
        ("{score: 4} or {", None),
    ],
)
def test_the_last_object_of_a_reply_is_found(reply, found):
    assert find_object(reply) == found


# The judge


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"score": 4}', 4),
        ('{"faithfulness": "5", "why": "all 3 facts"}', 5),
        ('{"score": 4.5}', 4.5),
        ('{"score": 6}', None),
        ('{"score": 1, "other": 2}', None),
        ('{"score": true}', None),
        ("Four.", None),
    ],
)
def test_the_score_is_the_only_number(reply, score):
    assert parse_score(reply) == score


def test_a_template_must_have_all_fields(tmp_path):
    assert read_template(None) == RUBRIC
    (tmp_path / "t.txt").write_text('{question} {response} {"score": 1}')
    with pytest.raises(ValueError, match=r"t.txt has no \{reference\}"):
        read_template(tmp_path / "t.txt")


def predictions(count: int) -> list[dict[str, Any]]:
    return [
        {"row": number, "question": "Who?", "answers": ["he", "him"], "prediction": f"reply {number}"}
        for number in range(count)
    ]


def test_verdicts_are_saved_and_not_asked_for_again(endpoint, tmp_path):
    def reply(prompt: str) -> str | int:
        number = int(re.findall(r"reply (\d)", prompt)[0])
        return 401 if number == 3 else "unsure" if number == 2 else f'{{"score": {number + 1}}}'

    endpoint.reply = reply
    rows, path = predictions(4), tmp_path / "verdicts.jsonl"
    chat = Chat("m", endpoint.url)
    with pytest.raises(ValueError, match="did not answer"):
        judge(rows, chat, RUBRIC, path, workers=1)
    saved = read_journal(path)
    assert [verdict["score"] for verdict in saved] == [1, 2, None]
    assert saved[2]["reply"] == "unsure" and saved[2]["row"] == 2
    endpoint.reply = lambda prompt: '{"score": 5}'
    endpoint.requests.clear()
    assert judge(rows, chat, RUBRIC, path, workers=4) == [1, 2, None, 5]
    (request,) = endpoint.requests
    prompt = request["messages"][0]["content"]
    assert "Question: Who?" in prompt and "Reference answer: he / him" in prompt and "Given answer: reply 3" in prompt
    judge(rows, Chat("another", endpoint.url), RUBRIC, path, workers=4)
    assert len(endpoint.requests) == 5


def test_a_refused_prompt_has_no_score_and_does_not_stop_the_others(endpoint, tmp_path):
    endpoint.reply = lambda prompt: 400 if "reply 1" in prompt else '{"score": 2}'
    rows, chat, path = predictions(3), Chat("m", endpoint.url), tmp_path / "verdicts.jsonl"
    for _ in range(2):
        assert judge(rows, chat, RUBRIC, path, workers=2) == [2, None, 2]
    assert len(read_journal(path)) == 2 and len(endpoint.requests) == 4
    with pytest.raises(ValueError, match="m refused a prompt"):  # as it would any other
        judge(rows[1:2], chat, RUBRIC, path, workers=2)


@pytest.mark.parametrize("parse", [run.parse_arguments, longspeech_eval.main])
def test_no_argument_takes_a_key_which_others_could_read(parse, capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    options = capsys.readouterr().out
    assert "-url" in options and "OPENAI_API_KEY" in options and "-key" not in options


def test_evaluate_adds_the_judges_scores_to_a_run(endpoint, checkpoint, tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    rows = [{"audio": "a.wav", "question": question, "answer": "he"} for question in ("Who?", "Why?", "When?")]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.txt").write_text("{question}|{reference}|{response}")
    command = ["evaluate", "--task", "qa", "--data", tmp_path / "qa.jsonl", "--model", checkpoint, "--device", "cpu"]
    command += ["--max-new-tokens", 3, "--output", tmp_path / "out"]
    command = [str(word) for word in command]
    assert cli.main(command) == 0
    endpoint.reply = lambda prompt: "?" if prompt.startswith("When?|he|") else '{"score": 1}'
    monkeypatch.setenv("OPENAI_API_KEY", "s3cr3t")
    options = ["--judge", "--judge-model", "m", "--judge-url", endpoint.url]
    assert cli.main([*command, *options, "--judge-template", str(tmp_path / "mine.txt")]) == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["scores"]["judge"]["value"] == 1 and summary["unparsable_verdicts"] == 1
    assert summary["run"]["judge_model"] == "m"
    assert [row["judge"] for row in read_journal(tmp_path / "out/predictions.jsonl")] == [1, 1, None]
    assert len(read_journal(tmp_path / "out/verdicts.jsonl")) == 3
    assert not any("s3cr3t" in path.read_text() for path in (tmp_path / "out").iterdir())


# Building LongSpeech-Eval

STORY = """The old man of the mountain lived in a small house with his dog. It was a cold winter, and the river that
ran by the house was frozen. He had to walk for an hour to get to the village, as his horse was ill."""
FORMULAS = STORY + r" Let $x^2 = 4$ and \alpha = 3, so that \frac{a}{b} = c and y = 2."
FRENCH = """Le vieil homme de la montagne vivait avec son chien dans une petite maison. Cet hiver, il faisait froid, et
la rivière qui passait devant la maison était gelée. Son cheval malade, il marchait longtemps vers le village."""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (STORY, None),
        (STORY.replace("his dog", "his café"), None),
        (FORMULAS, "formulas"),
        (FRENCH, "not English"),
        ("山里的老人和他的狗住在一间小房子里。", "not English"),
    ],
)
def test_documents_that_cannot_be_spoken_are_told(text, reason):
    found = longspeech_eval.unfit(text)
    assert found is None if reason is None else found.startswith(reason)


@pytest.fixture
def documents(tmp_path: Path) -> list[Path]:
    """Two files: our own form, and LongBench's."""
    own = [
        {"document": STORY, "question": "Where did the man live?", "answer": "in a small house"},
        {"document": STORY, "question": "What did he eat?", "answer": ["fish", "bread"]},
        {"document": STORY, "question": "What rude word?", "answer": "none"},
        {"document": FORMULAS, "question": "What is x?", "answer": "two"},
    ]
    longbench = [
        {"context": STORY + " The end.", "input": "Who was ill?", "answers": ["his horse", "the horse"], "length": 9},
        {"context": STORY + " Too long.", "input": "Who?", "answers": ["he"], "dataset": "narrativeqa"},
    ]
    paths = []
    for name, rows in (("own", own), ("narrativeqa", longbench)):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


@pytest.fixture
def speaker(tmp_path: Path) -> str:
    """A synthesizer that makes 0.1 s of noise for every word."""
    script = tmp_path / "speak.py"
    script.write_text(
        "import random, sys, wave\n"
        "words = len(open(sys.argv[1]).read().split())\n"
        "with wave.open(sys.argv[2], 'wb') as file:\n"
        "    file.setparams((1, 2, 16000, 0, 'NONE', None))\n"
        "    file.writeframes(random.Random(0).randbytes(3200 * words))\n"
    )
    return f"{sys.executable} {script} {{text}} {{wav}}"


def writer_and_checker(prompt: str) -> str | int:
    """Tells every document in ten words; refuses the long one and the rude question; finds no food in any text."""
    if "Document:" in prompt:
        return 400 if "Too long." in prompt else "A man with a dog lived in a small house."
    if "rude" in prompt:
        return 400
    return '{"answerable": false}' if "eat" in prompt else 'Yes: {"answerable": true}'


def test_a_benchmark_is_built_from_documents(endpoint, documents, speaker, tmp_path, capsys):
    endpoint.reply = writer_and_checker
    output = tmp_path / "built"
    command = [*map(str, documents), "--output", str(output), "--model", "writer", "--check-model", "checker"]
    longspeech_eval.main([*command, "--url", endpoint.url, "--speak", speaker, "--words", "10"])
    assert "2 recordings, mean 1.0 s, longest 1.0 s; 2 questions; 4 rejections" in capsys.readouterr().out

    for recording in (output / "speech").iterdir():
        recording.unlink()  # the dataset has the sound inside
    examples = load_questions("longspeech-eval", output / "dataset").examples
    assert [(example.question, example.answers, example.duration) for example in examples] == [
        ("Where did the man live?", ["in a small house"], 1.0),
        ("Who was ill?", ["his horse", "the horse"], 1.0),
    ]
    rejected = read_journal(output / "rejected.jsonl")
    reasons = {row.get("question", row["begins"][:7]): row["reason"] for row in rejected}
    assert reasons["What did he eat?"] == "not answerable from the spoken text"
    assert "checker refused a prompt" in reasons["What rude word?"]
    documents_out = sorted(row["reason"] for row in rejected if "question" not in row)
    assert [reason.split()[0] for reason in documents_out] == ["formulas:", "writer"]
    assert "refused a prompt" in documents_out[1]
    models = [request["model"] for request in endpoint.requests]
    assert models.count("writer") == 3 and models.count("checker") == 4
    assert all(
        "10 words" in request["messages"][0]["content"]
        for request in endpoint.requests
        if request["model"] == "writer"
    )


def test_a_build_that_failed_goes_on(endpoint, documents, speaker, tmp_path):
    output, asked = tmp_path / "built", []

    def fail_later(prompt: str) -> str | int:
        asked.append(prompt)
        return 401 if "The end." in prompt else writer_and_checker(prompt)

    endpoint.reply = fail_later
    command = [*map(str, documents), "--output", str(output), "--model", "m", "--url", endpoint.url, "--workers", "1"]
    with pytest.raises(ValueError, match="run the same command again"):
        longspeech_eval.main([*command, "--speak", speaker])
    endpoint.requests.clear()
    endpoint.reply = writer_and_checker
    with pytest.raises(ValueError, match="wrote no sound"):
        longspeech_eval.main([*command, "--speak", "true {text} {wav}"])
    assert [("The end." in request["messages"][0]["content"]) for request in endpoint.requests[:1]] == [True]
    endpoint.requests.clear()
    longspeech_eval.main([*command, "--speak", speaker])
    assert not endpoint.requests
    assert len({path.name.partition("-")[0] for path in (output / "speech").iterdir()}) == 2
    with pytest.raises(ValueError, match="exists already"):
        longspeech_eval.main([*command, "--speak", speaker])
    (output / "dataset").rename(output / "kept")
    with pytest.raises(ValueError, match="made with other settings"):
        longspeech_eval.main([*command, "--speak", speaker, "--words", "20"])


def test_a_document_of_which_more_is_asked_is_another(tmp_path):
    row = {"document": "a", "question": "b", "answer": "c"}
    ids = []
    for count in (1, 2, 1):
        path = tmp_path / "documents.jsonl"
        path.write_text((json.dumps(row) + "\n") * count)
        ids += [document["id"] for document in longspeech_eval.read_documents([path])]
    assert ids[0] == ids[2] != ids[1]


def test_lines_without_an_answer_are_named(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text('\n{"document": "a", "question": "b"}\n')
    with pytest.raises(ValueError, match=r"documents.jsonl line 2 lacks a document, a question or an answer"):
        longspeech_eval.read_documents([path])
