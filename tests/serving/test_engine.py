"""Answers that join, leave, wait and fail; one thread, no HTTP."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, random_model, tiny_config

from llmsparse.serving.engine import MOST_RUNNING, MOST_WAITING, Engine, QueueFullError
from llmsparse.serving.forward import CHUNK, Forward
from llmsparse.serving.sampling import Rules, Sampling
from llmsparse.serving.sequence import Ended, News, Sequence

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19], [20], [3, 4] * 10]
GREEDY = Sampling()
SECONDS = 60  # that nothing here should take


class Bench:
    """A model, its engine, and what that tells."""

    def __init__(self, model: Any, room: int = 10**5) -> None:
        self.model = model
        with torch.inference_mode():
            self.forward = Forward(model)
        self.rules = Rules(model)
        self.engine = Engine(self.forward, model.device, room)
        self.news = queue.Queue[tuple[int, News]]()

    def sequence(self, index: int, prompt: List[int], new: int, asked: Sampling = GREEDY, **options: Any) -> Sequence:
        chooses = options.pop("sampler", None) or self.rules.sampler(asked, len(prompt), new)
        alone = asked.seed is not None
        return Sequence(
            tuple(prompt), new, chooses, self.rules.ends, lambda news: self.news.put((index, news)), alone, **options
        )

    def answers(self, sequences: List[Sequence]) -> tuple[list[list[int]], list[News]]:
        """Tokens of each, and its last news."""
        self.engine.submit(sequences)
        tokens, last = [list[int]() for _ in sequences], dict[int, News]()
        while len(last) < len(sequences):
            index, news = self.news.get(timeout=SECONDS)
            if news.token is not None:
                tokens[index].append(news.token.token)
            if news.ended is not None:
                assert index not in last
                last[index] = news
        return tokens, [last[index] for index in range(len(sequences))]

    def idle(self) -> bool:
        state = self.engine.state()
        return (state.running, state.waiting, state.reserved) == (0, 0, 0)


def generated(model: Any, prompt: list[int], new: int) -> list[int]:
    """What `generate` says."""
    ids = torch.tensor([prompt])
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options)[
        0, len(prompt) :
    ].tolist()


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made = list[Bench]()

    def make(name: str = "llama", room: int = 10**5, **changes: Any) -> Bench:
        made.append(Bench(random_model(tiny_config(name, **changes)), room))
        made[-1].engine.start()
        return made[-1]

    yield make
    for one in made:
        one.engine.stop()
        one.engine.join()


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "mamba"])
def test_many_together_say_what_generate_says_of_each(name: str, bench: Callable[..., Bench]) -> None:
    made = bench(name)
    got, _ = made.answers([made.sequence(index, prompt, 20) for index, prompt in enumerate(PROMPTS)])
    assert got == [generated(made.model, prompt, 20) for prompt in PROMPTS]
    assert made.idle()


def test_most_families_run_together_and_the_others_say_why() -> None:
    why = {
        name: Bench(random_model(tiny_config(name))).forward.why_alone for name in ("llama", "gemma2", "bloom", "jamba")
    }
    assert why == {
        "llama": None,
        "gemma2": None,
        "bloom": "its attention cannot be replaced",
        "jamba": "it keeps more than keys and values",
    }


def test_a_long_prompt_is_read_in_parts_beside_others(bench: Callable[..., Bench]) -> None:
    made = bench(max_position_embeddings=4 * CHUNK)
    long = [3 + number % 90 for number in range(2 * CHUNK + 5)]
    got, _ = made.answers([made.sequence(0, long, 8), made.sequence(1, [5, 6, 7], 20)])
    assert got == [generated(made.model, long, 8), generated(made.model, [5, 6, 7], 20)]


def test_what_has_no_room_waits_its_turn(bench: Callable[..., Bench]) -> None:
    made = bench(room=64)
    got, last = made.answers([made.sequence(index, [5, 6, 7, index + 8], 20) for index in range(12)])
    assert got == [generated(made.model, [5, 6, 7, index + 8], 20) for index in range(12)]
    assert {news.ended for news in last} <= {Ended.LENGTH, Ended.STOP} and made.idle()


def test_more_than_a_batch_are_all_answered(bench: Callable[..., Bench]) -> None:
    made = bench()
    got, _ = made.answers([made.sequence(index, [5, 6], 3) for index in range(MOST_RUNNING + 20)])
    assert all(tokens == got[0] for tokens in got) and made.idle()


def test_the_queue_has_an_end_and_takes_all_or_none() -> None:
    made = Bench(random_model(tiny_config("llama")))  # not started, so that nothing leaves
    made.engine.submit([made.sequence(0, [5], 1)] * (MOST_WAITING - 1))
    with pytest.raises(QueueFullError):
        made.engine.submit([made.sequence(0, [5], 1)] * 2)
    made.engine.submit([made.sequence(0, [5], 1)])
    assert made.engine.state().waiting == MOST_WAITING


def test_what_is_cancelled_says_nothing_more_and_gives_its_room_back(bench: Callable[..., Bench]) -> None:
    made = bench(room=70, max_position_embeddings=64)
    first, second = made.sequence(0, [5, 6], 60), made.sequence(1, [5, 6], 60)
    first.sampler = held = Held()  # pyright: ignore[reportAttributeAccessIssue]
    made.engine.submit([first, second])
    assert held.asked.wait(SECONDS)
    made.engine.cancel([second])  # in the queue: there is no room for both
    made.engine.cancel([first])
    held.let_go.set()
    third = made.sequence(2, [7, 8], 60)
    made.engine.submit([third])
    told = [made.news.get(timeout=SECONDS)]
    while told[-1][1].ended is None:
        told.append(made.news.get(timeout=SECONDS))
    assert {index for index, _ in told} == {2}
    assert made.idle()


class Held:
    """A sampler that chooses when it is let go."""

    plain = False

    def __init__(self) -> None:
        self.asked, self.let_go = threading.Event(), threading.Event()

    def choose(self, logits: Any, ids: Any) -> int:
        self.asked.set()
        assert self.let_go.wait(SECONDS)
        return 7


class Failing:
    """A sampler with a mistake in it."""

    plain = False

    def choose(self, logits: Any, ids: Any) -> int:
        raise RuntimeError("a mistake\nof two lines")


def test_a_failure_in_choosing_is_that_answers_own(bench: Callable[..., Bench]) -> None:
    made = bench()
    sequences = [made.sequence(index, [5, 6, 7], 20) for index in range(3)]
    sequences[1] = made.sequence(1, [5, 6, 7], 20, sampler=Failing())
    got, last = made.answers(sequences)
    assert got[0] == got[2] == generated(made.model, [5, 6, 7], 20) and got[1] == []
    assert last[1].ended is Ended.FAILED and last[1].reason == "a mistake of two lines" and made.idle()


def test_a_step_that_fails_for_many_is_done_again_for_each(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench()
    step, steps = made.forward.step_together, [0]

    def failing(*arguments: Any) -> Any:
        steps[0] += 1
        logits = step(*arguments)  # so that keys and values of the step are written already
        if steps[0] == 4:
            raise RuntimeError("out of memory")
        return logits

    monkeypatch.setattr(made.forward, "step_together", failing)
    got, _ = made.answers([made.sequence(index, prompt, 20) for index, prompt in enumerate(PROMPTS)])
    assert got == [generated(made.model, prompt, 20) for prompt in PROMPTS]
    assert steps[0] == 4 and made.idle()


def test_a_step_that_fails_for_one_ends_that_one(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    made = bench()
    read = made.forward.read

    def failing(cache: Any, tokens: List[int], keep: int = 1) -> Any:
        if 42 in tokens:
            raise IndexError("no such row")
        return read(cache, tokens, keep)

    monkeypatch.setattr(made.forward, "read", failing)
    got, last = made.answers([made.sequence(0, [5, 6, 7], 9), made.sequence(1, [42], 9), made.sequence(2, [5], 9)])
    assert got == [generated(made.model, [5, 6, 7], 9), [], generated(made.model, [5], 9)]
    assert last[1].reason == "no such row" and made.idle()


def test_log_probabilities_of_a_prompt_are_the_models(bench: Callable[..., Bench]) -> None:
    made = bench(max_position_embeddings=4 * CHUNK)
    for prompt in (PROMPTS[1], [20], [3 + number % 90 for number in range(CHUNK + 9)]):
        made.engine.submit([made.sequence(0, prompt, 0, logprobs=2, score_prompt=True)])
        _, news = made.news.get(timeout=SECONDS)
        assert news.ended is Ended.LENGTH and news.token is None
        with torch.inference_mode():
            wanted = torch.log_softmax(made.model(torch.tensor([prompt])).logits[0].float(), -1)
        assert [scored.token for scored in news.scored_prompt] == prompt
        assert news.scored_prompt[0].logprob is None
        for position, scored in enumerate(news.scored_prompt[1:]):
            assert scored.logprob == pytest.approx(float(wanted[position, scored.token]), abs=1e-4)
            best = wanted[position].topk(2)
            assert [token for token, _ in scored.likeliest] == best.indices.tolist()


def test_log_probabilities_come_with_each_token_as_well(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.engine.submit([made.sequence(0, [5, 6, 7], 3, logprobs=1, score_prompt=True)])
    told = [made.news.get(timeout=SECONDS)[1] for _ in range(3)]
    assert [len(news.scored_prompt) for news in told] == [3, 0, 0]
    for news in told:
        assert news.token is not None and news.token.likeliest == ((news.token.token, news.token.logprob),)


def test_a_seeded_answer_is_the_same_whatever_else_runs(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.model.to(torch.bfloat16)  # whose rounding depends on how many rows a product has
    asked = Sampling(temperature=1.5, seed=7)
    (alone,), _ = made.answers([made.sequence(0, [5, 6, 7], 40, asked)])
    others = [made.sequence(index, [5, index], 40, Sampling(temperature=1.5)) for index in range(1, 9)]
    beside, _ = made.answers([made.sequence(0, [5, 6, 7], 40, asked), *others])
    assert beside[0] == alone


def test_at_the_end_every_answer_is_told_so() -> None:
    made = Bench(random_model(tiny_config("llama")))
    waiting = [made.sequence(index, [5, 6], 60) for index in range(3)]
    made.engine.submit(waiting)
    made.engine.stop()
    made.engine.start()
    made.engine.join()
    made.engine.submit([made.sequence(3, [5], 1)])  # too late
    told = [made.news.get_nowait() for _ in range(4)]
    assert [index for index, _ in told] == [0, 1, 2, 3] and {news.ended for _, news in told} == {Ended.STOPPING}
