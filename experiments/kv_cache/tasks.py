"""The two synthetic tasks: many-query recall (KVzip's case) and a redundant trace (R-KV's case).

Both are drawn with numpy in whole batches. A batch is ``tokens [B, T]`` and ``weights [B, T]``:
the weight of token ``t`` counts its prediction from the tokens before it.
"""

from dataclasses import dataclass

import numpy as np

PAD, BOS, SYS, KEY, VAL, END, ASK, ANS, REPEAT = range(9)
STEP, AGAIN, OK, QUERY, TRACE, CHECKS, DONE = range(9, 16)
SPECIAL = 20  # symbols start here
ANSWER_WEIGHT = 2.0  # of answers over repeated tokens, in training
LOOKUP_WEIGHT = 8.0  # of trace tokens that no copying predicts, in training
HINT = 8  # KVzip's later chunks are asked for by the last tokens of the chunk before


@dataclass(frozen=True)
class Recall:
    """Pairs ``KEY k1 k2 v1 v2 END`` among filler, then questions ``ASK k1 k2`` (E1, E2).

    The context is ``BOS SYS`` and ``slots`` segments of equal length: a pair, or filler from a
    low-entropy Markov chain. Training texts go on with questions, or with a repetition of the
    context (without which reconstruction scores have nothing to measure).

    Args:
        slots: segments of a context.
        pairs: how many of them hold a pair, at most half of ``symbols``.
        symbols: ids for keys, and as many for values and filler.
        marked: write ``VAL`` between key and value and ``ANS`` after a question. Then the answer
            follows a token that names no key, and takes a second step of matching to find.
        repeat_share: share of training texts that repeat.
    """

    slots: int = 8
    pairs: int = 3
    symbols: int = 16
    marked: bool = False
    repeat_share: float = 0.3

    def __post_init__(self):
        if not 1 <= self.pairs <= self.symbols // 2:
            raise ValueError(
                f"pairs={self.pairs}; expected 1 to {self.symbols // 2}, half of symbols"
            )

    @property
    def vocab_size(self) -> int:
        """Special ids, keys, values, filler."""
        return SPECIAL + 3 * self.symbols

    @property
    def segment(self) -> int:
        """Tokens of a segment."""
        return 6 + self.marked

    @property
    def context_length(self) -> int:
        """Tokens of a context."""
        return self.num_sinks + self.segment * self.slots

    @property
    def num_sinks(self) -> int:
        """The system prompt: never evicted."""
        return 2

    def contexts(
        self,
        rng: np.random.Generator,
        batch: int,
        slots: int | None = None,
        depth: float | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw contexts.

        Args:
            rng: source of randomness.
            batch: rows.
            slots: segments; ``None``: the task's.
            depth: put a single pair at this share of the context, in [0, 1]; ``None``: all pairs,
                anywhere.

        Returns:
            tokens ``[B, T]``, keys ``[B, N, 2]`` and values ``[B, N, 2]``.
        """
        slots = self.slots if slots is None else slots
        count = max(self.pairs * slots // self.slots, 1) if depth is None else 1
        first, size = SPECIAL, self.segment
        # No two pairs of a context share a key token: one token is enough to find a pair.
        names = np.argsort(rng.random((2, batch, self.symbols)), axis=-1)[..., :count]
        keys = first + np.moveaxis(names, 0, -1)
        # Nor a value: else what follows one is ambiguous, which two seeds of three never learned.
        drawn = np.argsort(rng.random((batch, self.symbols)), axis=-1)[:, : 2 * count]
        values = first + self.symbols + drawn.reshape(batch, count, 2)
        jumps = rng.choice([1, 1, 1, 2], size=(batch, size * slots))
        filler = (rng.integers(self.symbols, size=(batch, 1)) + np.cumsum(jumps, 1)) % self.symbols
        body = (first + 2 * self.symbols + filler).reshape(batch, slots, size)
        if depth is None:
            places = np.argsort(rng.random((batch, slots)), axis=1)[:, :count]
        else:
            places = np.full((batch, 1), round(depth * (slots - 1)))
        ones = np.ones((batch, count, 1), int)
        parts = [KEY * ones, keys, *[VAL * ones] * self.marked, values, END * ones]
        np.put_along_axis(body, places[..., None], np.concatenate(parts, axis=-1), axis=1)
        head = np.tile([BOS, SYS], (batch, 1))
        return np.concatenate([head, body.reshape(batch, -1)], axis=1), keys, values

    def questions(self, keys: np.ndarray) -> np.ndarray:
        """Return ``ASK k1 k2`` (and ``ANS``, if marked) for keys ``[..., 2]``."""
        ones = np.ones((*keys.shape[:-1], 1), int)
        return np.concatenate([ASK * ones, keys, *[ANS * ones] * self.marked], axis=-1)

    def batch(
        self, rng: np.random.Generator, batch: int, slots: int | None = None, groups: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw training texts, twice as long as a context, ``REPEAT ANS`` and a hint.

        Args:
            rng: source of randomness.
            batch: rows.
            slots: segments of a whole context; ``None``: the task's.
            groups: parts of the batch. The first has whole contexts, each further one contexts of
                2 segments or more, and more questions instead: the easy cases teach the hard ones.
        """
        slots = self.slots if slots is None else slots
        total = 2 * (self.num_sinks + self.segment * slots) + 2 + HINT
        sizes = [slots, *rng.integers(2, slots + 1, size=groups - 1)]
        rows = [len(x) for x in np.array_split(range(batch), groups)]
        parts = [self._texts(rng, n, int(k), total) for n, k in zip(rows, sizes, strict=True)]
        tokens, weights = zip(*parts, strict=True)
        return np.concatenate(tokens), np.concatenate(weights)

    def _texts(self, rng: np.random.Generator, batch: int, slots: int, total: int):
        """Draw training texts of ``total`` tokens whose contexts have so many segments."""
        context, keys, values = self.contexts(rng, batch, slots)
        length = context.shape[1]
        tail, size = total - length, 5 + self.marked
        count = tail // size
        which = rng.integers(keys.shape[1], size=(batch, count))[..., None]
        asked, answers = (np.take_along_axis(x, which, axis=1) for x in (keys, values))
        asked = np.concatenate([self.questions(asked), answers], axis=-1).reshape(batch, -1)
        asked = np.pad(asked, ((0, 0), (0, tail - asked.shape[1])))
        place = np.arange(tail)
        counted = (place % size >= size - 2) & (place < size * count)

        # Half of the repetitions start at the beginning, half somewhere with a hint before it.
        begin = np.where(rng.random(batch) < 0.5, 0, rng.integers(HINT, length - 4, batch))
        place = place[None] - 1  # what follows REPEAT
        hint = np.where(begin > 0, HINT, 0)[:, None]
        source = begin[:, None] - hint + place - (place > hint)
        repeated = np.take_along_axis(context, np.clip(source, 0, length - 1), axis=1)
        repeated = np.where(place == hint, ANS, repeated)
        repeated[:, 0] = REPEAT
        inside = (place > hint) & (source < length)
        repeated = np.where(inside | (place <= hint), repeated, PAD)

        repeat = (rng.random(batch) < self.repeat_share)[:, None]
        rest = np.where(repeat, repeated, asked)
        weights = np.where(repeat, inside, ANSWER_WEIGHT * counted).astype(float)
        head = np.zeros(context.shape)
        return np.concatenate([context, rest], 1), np.concatenate([head, weights], 1)


@dataclass(frozen=True)
class Trace:
    """A program run step by step, every step restated a few times (E3, E4).

    The prompt lists start values ``VAL x d``, the program ``k y' c x'`` (line ``k``: ``x = y + c``
    modulo ``base``), ``CHECKS n``, ``QUERY x'``, ``TRACE``. Program and
    question name variables in an alphabet of their own (``x'`` is ``x``), so that whatever follows
    an ``x`` is its value. Lines are numbered: without numbers a model counts the steps that it can
    see, which no cache that forgets some survives.

    The trace has ``k y v c x d`` per line (``y`` is ``v``, plus ``c``, so ``x`` is ``d``), then
    ``n`` restatements ``m AGAIN y v c x d OK`` (``m`` counts down, so that greedy decoding knows
    when to stop) and, with them, a filler phrase of four tokens. It ends with ``ANS x d DONE`` for
    a variable written in the first half, or, with ``overwrite``, the one not written for longest.

    Args:
        starts: variables with a start value.
        steps: lines of the program.
        base: values are ``0 … base - 1``.
        constants: ``c`` is below this.
        names: ids for variables, at least ``starts + steps``.
        checks: restatements seen in training, ``0 … checks``.
        overwrite: lines write the variables that have start values, again and again, as the
            specification has it: what was said of a variable before is of no more use. Otherwise
            every line writes a fresh one, and no value ever loses its use.
    """

    starts: int = 3
    steps: int = 6
    base: int = 8
    constants: int = 4
    names: int = 24
    checks: int = 3
    overwrite: bool = False

    @property
    def variables(self) -> int:
        """Variables of a program of ``steps`` lines."""
        return self.starts + (0 if self.overwrite else self.steps)

    @property
    def vocab_size(self) -> int:
        """Special ids, counters, variables, values, constants, filler words, variables, lines."""
        return self._line + self.names

    @property
    def _counter(self) -> int:
        return SPECIAL

    @property
    def _name(self) -> int:
        return self._counter + self.checks + 1

    @property
    def _value(self) -> int:
        return self._name + self.names

    @property
    def _constant(self) -> int:
        return self._value + self.base

    @property
    def _filler(self) -> int:
        return self._constant + self.constants

    @property
    def _line_name(self) -> int:
        return self._filler + 4

    @property
    def _line(self) -> int:
        return self._line_name + self.names

    def step_length(self, checks: int) -> int:
        """Tokens of one step of the trace."""
        return 6 + (8 * checks + 4 if checks else 0)

    def redundancy(self, checks: int) -> float:
        """Share of a step's tokens that restate or fill."""
        return 1 - 6 / self.step_length(checks)

    def problems(
        self,
        rng: np.random.Generator,
        batch: int,
        checks: int,
        steps: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw prompts ``[B, P]`` and their gold traces ``[B, M]``, the answer third from last.

        Args:
            rng: source of randomness.
            batch: rows.
            checks: restatements per step.
            steps: lines of the program; ``None``: the task's.
        """
        steps = self.steps if steps is None else steps
        total = self.starts + (0 if self.overwrite else steps)
        if total > self.names:
            raise ValueError(f"names={self.names}; {total} variables need as many")
        names = np.argsort(rng.random((batch, self.names)), axis=1)[:, :total]
        values = np.zeros((batch, total), int)
        values[:, : self.starts] = rng.integers(self.base, size=(batch, self.starts))
        begun = values[:, : self.starts].copy()
        source, target = np.zeros((2, batch, steps), int)
        before, after = np.zeros((2, batch, steps), int)
        plus = rng.integers(self.constants, size=(batch, steps))
        row = np.arange(batch)
        written = np.full((batch, total), steps)  # the last line that writes a variable
        for step in range(steps):
            target[:, step] = self.starts + step
            if self.overwrite:
                target[:, step] = rng.integers(total, size=batch)
                source[:, step] = target[:, step] + 1 + rng.integers(total - 1, size=batch)
                source[:, step] %= total
            else:
                source[:, step] = rng.integers(self.starts + step, size=batch)
            before[:, step] = values[row, source[:, step]]
            after[:, step] = (before[:, step] + plus[:, step]) % self.base
            values[row, target[:, step]] = after[:, step]
            written[row, target[:, step]] = step
        x, y = (self._name + np.take_along_axis(names, z, axis=1) for z in (target, source))
        c, d = self._constant + plus, self._value + after
        ones = np.ones((batch, steps, 1), int)

        def flat(*parts):
            return np.concatenate([np.reshape(p, (batch, -1)) for p in parts], axis=1)

        known = self._name + names[:, : self.starts]
        starts = np.stack([VAL * np.ones_like(known), known, self._value + begun], -1)
        prime = self._line_name - self._name
        begin = rng.integers(self.names - steps + 1, size=(batch, 1, 1))  # lines count on from here
        number = self._line + begin + np.arange(steps)[:, None]
        lines = np.stack([number[..., 0], y + prime, c, x + prime], axis=-1)
        if self.overwrite:
            asked = np.argmin(written, axis=1)
        else:
            asked = self.starts + rng.integers(max(steps // 2, 1), size=batch)
        wanted = self._name + names[row, asked]
        tail = np.stack(
            [
                *np.tile([[CHECKS], [self._counter + checks], [QUERY]], (1, batch)),
                wanted + prime,
                np.full(batch, TRACE),
            ],
            axis=-1,
        )
        prompt = flat(np.full((batch, 1), BOS), starts, lines, tail)
        said = np.stack([y, self._value + before, c, x, d], axis=-1)
        parts = [number, said]
        for left in range(checks, 0, -1):
            parts += [(self._counter + left) * ones, AGAIN * ones, said, OK * ones]
        if checks:
            parts += [np.tile(self._filler + np.arange(4), (batch, steps, 1))]
        body = np.concatenate(parts, axis=-1)
        told = self._value + values[row, asked]
        last = np.stack([np.full(batch, ANS), wanted, told], axis=-1)
        return prompt, flat(body, last, np.full((batch, 1), DONE))

    def drill(
        self, rng: np.random.Generator, batch: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw texts of nothing but lookups: ``VAL x d`` of some variables, then ``STEP y v``.

        In a trace few tokens look a value up, and a model learns everything but these.

        Args:
            rng: source of randomness.
            batch: rows.
            length: tokens of a text.
        """
        count = rng.integers(2, min(self.variables, length // 6) + 1)
        names = np.argsort(rng.random((batch, self.names)), axis=1)[:, :count]
        asked = rng.integers(count, size=(batch, (length - 1) // 3 - count))
        which = np.concatenate([np.tile(np.arange(count), (batch, 1)), asked], axis=1)
        writes = np.broadcast_to(np.arange(which.shape[1]) < count, which.shape)
        if self.overwrite:
            writes = writes | (rng.random(which.shape) < 0.3)
        values = rng.integers(self.base, size=which.shape)
        row, held = np.arange(batch), np.zeros((batch, count), int)
        for step in range(which.shape[1]):
            old = held[row, which[:, step]]
            values[:, step] = np.where(writes[:, step], values[:, step], old)
            held[row, which[:, step]] = values[:, step]
        parts = [
            np.where(writes, VAL, STEP),
            self._name + np.take_along_axis(names, which, axis=1),
            self._value + values,
        ]
        body = np.stack(parts, axis=-1).reshape(batch, -1)
        text = np.concatenate([np.full((batch, 1), BOS), body], axis=1)
        weights = np.zeros((batch, length))
        weights[:, 3 : text.shape[1] : 3] = LOOKUP_WEIGHT * ~writes
        return np.pad(text, ((0, 0), (0, length - text.shape[1]))), weights

    def batch(
        self,
        rng: np.random.Generator,
        batch: int,
        most: int | None = None,
        drills: int = 0,
        steps: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw training texts, equally many for each number of restatements.

        Args:
            rng: source of randomness.
            batch: rows.
            most: restatements, at most; ``None``: ``checks``.
            drills: rows that are a :meth:`drill`.
            steps: lines of the programs; ``None``: the task's.
        """
        most = self.checks if most is None else most
        steps = self.steps if steps is None else steps
        longest = steps * self.step_length(most) + 4
        whole = 1 + 3 * self.starts + 4 * steps + 5 + longest
        texts, weights = [], []
        for begin in range(0, drills, 16):  # sixteen rows have equally many variables
            text, weight = self.drill(rng, min(16, drills - begin), whole)
            texts.append(text)
            weights.append(weight)
        shares = np.array_split(np.arange(batch - drills), most + 1)
        for checks, share in enumerate(shares if batch > drills else ()):
            prompt, trace = self.problems(rng, share.size, checks, steps)
            pad = ((0, 0), (0, longest - trace.shape[1]))
            texts.append(np.concatenate([prompt, np.pad(trace, pad)], axis=1))
            weight = np.ones(trace.shape)
            # Few tokens look a value up, read the program or add; everything else copies or counts,
            # and a model that cannot add still says 99 % of a trace right.
            for place in range(2, 6):  # v, c, x, d of a line said for the first time
                weight[:, place : -4 : self.step_length(checks)] = LOOKUP_WEIGHT
            weight[:, -2] = LOOKUP_WEIGHT
            weight = np.pad(weight, pad)
            weights.append(np.concatenate([np.zeros(prompt.shape), weight], axis=1))
        return np.concatenate(texts), np.concatenate(weights)
