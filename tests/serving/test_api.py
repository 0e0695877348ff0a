"""What clients of OpenAI's API ask, over HTTP, of a packed model in float32 and of the embedded one in bf16."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from serving_process import Running

MESSAGES: Any = [{"role": "user", "content": "hi"}]


def text_of(choices: list[Any]) -> str:
    return choices[0]["text"]


def test_greedy_is_one_answer_in_bf16(trained: Running) -> None:
    prompts = ["    def __str__(self):", "        curr = ", "        return result", "import "]
    for prompt in prompts:
        for asked in ({"temperature": 0}, {}, {"temperature": 1e-38}, {"temperature": 1, "top_k": 1}):
            answers = {text_of(trained.complete(prompt, max_tokens=24, **asked)) for _ in range(3)}
            answers.add(text_of(trained.complete(prompt, max_tokens=24, temperature=0)))
            assert len(answers) == 1, (prompt, asked, answers)


@pytest.mark.slow
def test_fifty_greedy_prompts_have_one_answer_each_in_twelve_tries(trained: Running) -> None:
    for number in range(50):
        prompt = f"class Number{number}:\n    def method_{number % 7}(self, value_{number % 5}):\n        "
        assert len({text_of(trained.complete(prompt, max_tokens=16, temperature=0)) for _ in range(12)}) == 1, prompt


def test_answers_end_before_a_stop_string_wherever_tokens_are_cut(server: Running, greedy: Any) -> None:
    whole = greedy("def main(", 24)
    for first in range(2, 12):
        for size in (1, 2, 5):
            stop = whole[first : first + size]
            (choice,) = server.complete("def main(", max_tokens=24, stop=[stop, "\x00never\x00"])
            assert choice["text"] == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"
            streamed = server.events(prompt="def main(", max_tokens=24, stop=stop)
            assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == choice["text"]
    (choice,) = server.complete("def main(", max_tokens=24, stop=whole + "x")
    assert choice["text"] == whole and choice["finish_reason"] == "length", "what was held back is said"


def test_a_stop_string_ends_the_work_too(server: Running, greedy: Any) -> None:
    stop = greedy("def main(", 24)[2:4]
    status, answer = server.ask(prompt="def main(", max_tokens=100, stop=stop)
    assert status == 200 and answer["usage"]["completion_tokens"] < 24
    chat = server.client().chat.completions.create(model=server.model, messages=MESSAGES, max_tokens=50, stop=stop)
    assert stop not in (chat.choices[0].message.content or "")


def test_the_same_seed_is_the_same_text_whatever_else_runs(trained: Running) -> None:
    def ask(seed: int | None) -> str:
        return text_of(trained.complete("def ", max_tokens=24, temperature=1.5, seed=seed))

    alone = {seed: ask(seed) for seed in (0, 1, -7)}
    assert len(set(alone.values())) == 3
    with ThreadPoolExecutor(8) as threads:
        beside = list(threads.map(ask, [0, None, 1, None, -7, None, 0, None]))
    assert [beside[0], beside[2], beside[4], beside[6]] == [alone[0], alone[1], alone[-7], alone[0]]
    assert len({*beside[1::2], *alone.values()}) == 7


def test_several_answers_and_several_prompts_are_choices_in_order(trained: Running) -> None:
    several = trained.complete("def ", max_tokens=12, temperature=1.5, seed=3, n=3)
    assert [choice["index"] for choice in several] == [0, 1, 2] and len({choice["text"] for choice in several}) == 3
    assert several[0]["text"] == text_of(trained.complete("def ", max_tokens=12, temperature=1.5, seed=3))
    both = trained.complete(["def ", "import "], max_tokens=8, n=2, temperature=0)
    alone = [text_of(trained.complete(prompt, max_tokens=8, temperature=0)) for prompt in ("def ", "import ")]
    assert [choice["text"] for choice in both] == [alone[0], alone[0], alone[1], alone[1]]
    assert [choice["index"] for choice in both] == [0, 1, 2, 3]


def test_usage_counts_every_prompt_once_and_every_answer(server: Running) -> None:
    _, answer = server.ask(prompt=[[5, 6, 7], [8, 9]], max_tokens=4, n=2, seed=1, temperature=1)
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["completion_tokens"] <= 16
    assert answer["usage"]["total_tokens"] == 5 + answer["usage"]["completion_tokens"]


def test_token_ids_are_the_prompt_as_it_stands(server: Running, greedy: Any) -> None:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(server.model)("def main(")["input_ids"]
    assert text_of(server.complete(ids, max_tokens=8)) == greedy("def main(", 8)
    assert [choice["text"] for choice in server.complete([ids, ids], max_tokens=8)] == [greedy("def main(", 8)] * 2


def test_echo_says_the_prompt_first(server: Running, greedy: Any) -> None:
    assert text_of(server.complete("def main(", max_tokens=8, echo=True)) == "def main(" + greedy("def main(", 8)
    (choice,) = server.complete("def main(", max_tokens=0, echo=True)
    assert choice["text"] == "def main(" and choice["finish_reason"] == "length"
    streamed = server.events(prompt=["def ", "x"], max_tokens=3, echo=True)
    texts = ["".join(one["choices"][0]["text"] for one in streamed if one["choices"][0]["index"] == n) for n in (0, 1)]
    assert texts == ["def " + greedy("def ", 3), "x" + greedy("x", 3)]


def test_log_likelihoods_of_a_prompt_are_the_models(server: Running) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(server.model)
    model = AutoModelForCausalLM.from_pretrained(server.model)
    ids = tokenizer("def main(argv):\n    return 0\n")["input_ids"]
    with torch.no_grad():
        wanted = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    (choice,) = server.complete([ids], max_tokens=0, echo=True, logprobs=2)
    scores = choice["logprobs"]
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    assert scores["token_logprobs"][1:] == pytest.approx(
        [float(wanted[position, token]) for position, token in enumerate(ids[1:])], abs=1e-4
    )
    assert max(scores["top_logprobs"][1].values()) == pytest.approx(float(wanted[0].max()), abs=1e-4)
    assert "".join(scores["tokens"]) == choice["text"] == tokenizer.decode(ids)
    assert scores["text_offset"] == [sum(map(len, scores["tokens"][:number])) for number in range(len(ids))]


def test_log_probabilities_of_an_answer_in_both_forms(server: Running, greedy: Any) -> None:
    (choice,) = server.complete("def main(", max_tokens=4, logprobs=0)
    scores = choice["logprobs"]
    assert "".join(scores["tokens"]) == greedy("def main(", 4)
    assert [list(best.values()) for best in scores["top_logprobs"]] == [[one] for one in scores["token_logprobs"]]
    chat = server.client().chat.completions.create(
        model=server.model, messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=3
    )
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    for token in chat.choices[0].logprobs.content:
        assert token.top_logprobs[0].token == token.token and len(token.top_logprobs) == 3
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
    streamed = server.events(prompt="def main(", max_tokens=4, logprobs=0)
    tokens = [one for chunk in streamed for one in (chunk["choices"][0]["logprobs"] or {"tokens": []})["tokens"]]
    assert tokens == scores["tokens"]


def test_a_stream_is_as_openai_specifies(server: Running) -> None:
    for asked in (True, False, None):
        options = {} if asked is None else {"stream_options": {"include_usage": asked}}
        chunks = server.events(prompt="def ", max_tokens=3, **options)
        own = [chunk for chunk in chunks if not chunk["choices"]]
        assert len(own) == bool(asked) and not [chunk for chunk in chunks if chunk["choices"] and chunk.get("usage")]
        assert not asked or (chunks[-1] is own[0] and own[0]["usage"]["completion_tokens"] == 3)
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]][-1] == "length"
        assert len({chunk["id"] for chunk in chunks}) == 1 and {chunk["object"] for chunk in chunks} == {
            "text_completion"
        }
    chat = server.events("chat/completions", messages=MESSAGES, max_tokens=3)
    assert chat[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chat[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert {chunk["object"] for chunk in chat} == {"chat.completion.chunk"}


def test_openais_client_reads_streams_of_several_choices(server: Running) -> None:
    stream = server.client().chat.completions.create(
        model=server.model, messages=MESSAGES, max_tokens=5, n=3, stream=True, stream_options={"include_usage": True}
    )
    texts, usage = {0: "", 1: "", 2: ""}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert len(set(texts.values())) == 1 and texts[0] and usage is not None and usage.completion_tokens == 15


def test_a_model_is_looked_up_by_its_names(server: Running) -> None:
    folder = server.model.rpartition("/")[2]
    for name in (server.model, folder):
        assert server.client().models.retrieve(folder).id == server.model
        assert server.send("GET", f"/v1/models/{name}")[1]["id"] == server.model
        assert server.ask(prompt="x", max_tokens=1, model=name)[1]["model"] == server.model
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        server.client().models.retrieve("gpt-9")


def test_head_and_options_are_answered_wherever_get_or_post_is(server: Running) -> None:
    for path in ("/health", "/metrics"):
        status, headers, body = server.exchange("HEAD", path)
        assert (status, body) == (200, b"") and int(headers["content-length"]) > 0
    assert server.exchange("HEAD", "/v1/models")[0] == 401
    preflight = {"Origin": "http://localhost:3000", "Access_Control_Request_Method": "POST"}
    for path, methods in (("/v1/chat/completions", "POST, OPTIONS"), ("/v1/models", "GET, HEAD, OPTIONS")):
        status, headers, _ = server.exchange("OPTIONS", path, **preflight)
        assert status == 204 and headers["allow"] == methods and "access-control-allow-origin" not in headers
    assert server.exchange("OPTIONS", "/nowhere")[0] == 404
    assert server.exchange("PUT", "/v1/models", Authorization="Bearer correct-horse")[0] == 405


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
def test_the_name_of_the_scheme_has_no_case(server: Running, scheme: str) -> None:
    assert server.exchange("GET", "/v1/models", Authorization=f"{scheme} correct-horse")[0] == 200
    assert server.exchange("GET", "/v1/models", Authorization=f"{scheme} wrong")[0] == 401
    assert server.exchange("GET", "/v1/models", Authorization="correct-horse")[0] == 401


def test_metrics_count_what_was_asked_and_answered(server: Running) -> None:
    def value(name: str) -> float:
        lines = server.exchange("GET", "/metrics")[2].decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    refused = 'llmsparse_requests_total{path="/v1/completions",status="400"}'
    before = [value(name) for name in ("llmsparse_generated_tokens_total", "llmsparse_prompt_tokens_total", refused)]
    _, answer = server.ask(prompt="def main(", max_tokens=6)
    server.ask(prompt="x", max_tokens=-1)
    after = [value(name) for name in ("llmsparse_generated_tokens_total", "llmsparse_prompt_tokens_total", refused)]
    usage = answer["usage"]
    assert [now - then for now, then in zip(after, before, strict=True)] == [
        usage["completion_tokens"],
        usage["prompt_tokens"],
        1,
    ]
    assert value("llmsparse_running") == value("llmsparse_waiting") == value("llmsparse_reserved_tokens") == 0
    assert value("llmsparse_first_token_seconds_count") > 0 and value("llmsparse_room_tokens") >= 128


def test_an_option_that_the_template_reads_is_passed_to_it(server: Running, greedy: Any) -> None:
    loud = server.ask("chat/completions", messages=MESSAGES, max_tokens=6, chat_template_kwargs={"loud": True})[1]
    assert loud["choices"][0]["message"]["content"] == greedy("user: hi\nLOUD assistant:", 6)


def test_names_that_were_given_and_pages_that_may_come(started: Any, packed: Any) -> None:
    named = started(
        f"./{packed.name}", "--served-model-name", "small", "--allow-origin", "http://a.example", cwd=packed.parent
    )
    for name in ("small", packed.name, f"./{packed.name}"):
        assert named.ask(prompt="x", max_tokens=1, model=name)[1]["model"] == "small"
    assert [model.id for model in named.client().models.list()] == ["small"]
    ask = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,content-type"}
    status, headers, _ = named.exchange("OPTIONS", "/v1/completions", Origin="http://a.example", **ask)
    assert status == 200 and headers["access-control-allow-origin"] == "http://a.example"
    assert named.exchange("OPTIONS", "/v1/completions", Origin="http://b.example", **ask)[0] == 400
    body = json.dumps({"prompt": "x", "max_tokens": 1})
    _, headers, _ = named.exchange("POST", "/v1/completions", body, Origin="http://a.example")
    assert headers["access-control-allow-origin"] == "http://a.example"
    assert "access-control-allow-origin" not in named.exchange("GET", "/health", Origin="http://b.example")[1]
