"""Drafts of what a text will say next, taken from the text itself, and whether computing them pays.

Where the last tokens of a text stood before, it may go on as it did there: answers quote, rewrite and repeat. A draft
is run in one pass with the next token, and each of its tokens counts as far as the sampler chooses it, from the very
logits that it would have had alone. So a draft changes the time that a text takes, and nothing else.
docs/speculation.md says more.

The idea: inference with reference (arXiv 2304.04487) and prompt lookup. Only long drafts: a pass of a few tokens
already reads most of a layer's experts. A gate by what was measured: Cascade (arXiv 2506.20675).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

NEAR, SURE, FAR = 8, 16, 32  # tokens that must stand elsewhere, too: after copying, to begin with, for a long draft
FIRST, SHORT, LONG = 8, 16, 32  # tokens of a draft: of a row that has won nothing yet; after that
SHARE = 0.015  # of the time of plain steps, which drafts may lose
WEIGHT = 0.2  # of the latest time in a mean


class Lookup:
    """A text, and where its last tokens stood before.

    A token costs one look into a dictionary and one entry there, about 130 bytes.

    Attributes:
        length: how many last tokens stood before, in one piece; 0 if they are fewer than `NEAR`.

    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self.length = 0
        self._tokens: list[int] = []
        self._ends: dict[int, int] = {}  # by the hash of NEAR tokens, the place behind them where they stood last
        self._next = 0  # the place of the token that followed
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """The text's next token."""
        tokens = self._tokens
        follows = self.length and tokens[self._next] == token
        tokens.append(token)
        if len(tokens) < NEAR:
            return
        key = hash(tuple(tokens[-NEAR:]))
        if follows:  # of all places the one that was longest stays the longest
            self.length, self._next = self.length + 1, self._next + 1
        else:
            self._next = self._ends.get(key, 0)
            self.length = self._common(self._next) if self._next else 0
        self._ends[key] = len(tokens)

    def continuation(self, count: int) -> list[int]:
        """The tokens that followed; where they reach the text's end, they go on with themselves."""
        found = self._tokens[self._next : self._next + count]
        while 0 < len(found) < count:
            found += found[: count - len(found)]
        return found

    def _common(self, place: int) -> int:
        """How many tokens before `place` are those at the text's end; 0 if fewer than NEAR. It is counted up to FAR."""
        tokens, most = self._tokens, min(place, FAR)
        count = next((back for back in range(1, most + 1) if tokens[place - back] != tokens[-back]), most + 1) - 1
        return count if count >= NEAR else 0


class Account:
    """What drafts have cost, in seconds, measured while the engine runs; all rows share it.

    Attributes:
        token: the time of a token of a plain step, on average; 0 before the first one.
        debt: what drafts have lost and nothing has made up for. Plain steps pay it off by a SHARE of their time.

    """

    def __init__(self) -> None:
        self.token = 0.0
        self.debt = 0.0

    def stepped(self, rows: int, seconds: float) -> None:
        """A plain step of so many rows took so long."""
        time = seconds / rows
        self.token += WEIGHT * (time - self.token) if self.token else time
        self.debt = max(0.0, self.debt - SHARE * seconds)


class Speculation:
    """The drafts of one row.

    A row spends what its own drafts have won. Beyond that it makes debts, and while there are any, nobody begins. So
    whatever a machine's passes take, all rows together lose a SHARE of their time, and one draft each at once.

    Attributes:
        drafted: tokens that were run ahead.
        accepted: those of them that the text really has.

    """

    def __init__(self, account: Account, tokens: Iterable[int]) -> None:
        self.drafted = self.accepted = 0
        self._account = account
        self._lookup = Lookup(tokens)
        self._draft: deque[int] = deque()  # what is left of the last one
        self._won = 0.0  # seconds

    def add(self, token: int) -> None:
        """The row's next token."""
        self._lookup.add(token)
        if not self._draft:
            return
        if self._draft.popleft() != token:
            self._draft.clear()
            return
        self.accepted += 1
        repaid = min(self._account.debt, self._account.token)
        self._account.debt -= repaid
        self._won += self._account.token - repaid

    def draft(self, most: int) -> list[int]:
        """Up to `most` tokens that probably follow; none where that is too little, or there are debts."""
        length = self._lookup.length
        if not self._account.token or length < (NEAR if self._won else SURE) or most < FIRST:
            return []
        if not self._won:
            return [] if self._account.debt else self._lookup.continuation(FIRST)
        return self._lookup.continuation(min(LONG if length >= FAR else SHORT, most))

    def passed(self, draft: list[int], seconds: float) -> None:
        """The draft was run with the token before it, in so much time; what `add` is given next may be of it."""
        self.drafted += len(draft)
        self._draft = deque(draft)
        cost = max(0.0, seconds - self._account.token)
        own = min(self._won, cost)
        self._won -= own
        self._account.debt += cost - own
