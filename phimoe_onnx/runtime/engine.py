"""The engine: requests get a slot, run side by side, and leave; every caller is served by whoever drives.

It has no thread of its own. Whoever needs a piece calls `step`, one thread at a time, and that serves all rows; the
others wait for their piece or for the driver's seat. So a caller that pauses holds nobody up: its row goes on with the
others, and its pieces wait. A service may as well give one thread the seat for good, and `submit` and `cancel` from
others.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from phimoe_onnx.errors import EngineFullError, GenerationError
from phimoe_onnx.runtime.decoder import Decoder
from phimoe_onnx.runtime.request import Request
from phimoe_onnx.runtime.row import Piece, Row
from phimoe_onnx.runtime.slots.base import free_place
from phimoe_onnx.runtime.speculation import Account
from phimoe_onnx.text.tokenizer import Tokenizer


class Engine:
    """Runs requests in at most `slots` slots; as many as `queue` may wait for one.

    A step is one new token of every row that is past its prompt, and then chunks of prompts, one a row and
    `prefill_chunk` tokens in all: so nobody waits longer than a chunk takes, and a prompt is cut into the same chunks
    whoever else is there. A row's tokens are those that it gets alone, as far as the kernels compute one row and
    several alike; on the CPU a sum's order may differ, and with it the last bits of a logit.

    A row that speculates may get several tokens in one step: those of a draft that was run ahead, as far as they are
    what is chosen (speculation.py). Drafts are run while no prompt is, `prefill_chunk` tokens of them in all.

    An error ends its own row only. Caches are made as rows need them, and freed when none is left.
    """

    def __init__(
        self, open_decoder: Callable[[int, int], Decoder], tokenizer: Tokenizer, slots: int = 64, queue: int = 1024
    ) -> None:
        self.slots = slots
        self.queue = queue
        self.account = Account()
        self._open = open_decoder  # of so many slots and tokens
        self._tokenizer = tokenizer
        # Rows, slots and decoder belong to the driver; with the lock held and nobody driving, to the lock's holder. The
        # lock is one that its thread may take again: a finalizer may run anywhere.
        self._lock = threading.Condition(threading.RLock())
        self._driver = 0  # the thread that has the seat, by its ident; 0 is nobody
        self._decoder: Decoder | None = None
        self._arrived: deque[Row] = deque()
        self._left: deque[Row] = deque()  # cancelled
        self._forgotten: deque[object] = deque()  # sessions
        self._prefilling: deque[Row] = deque()
        self._running: dict[int, Row] = {}  # by slot
        self._parked: dict[object, int] = {}  # the slot of each session that no row runs in, the longest parked first

    def submit(
        self, requests: Sequence[Request], deliver: Callable[[Piece | Exception], None], session: object = None
    ) -> list[Row]:
        """Takes requests in, which begin together where there are slots for all; any thread may call it at any time.

        Args:
            requests: a piece's `row` says which of them it is of.
            deliver: called by the driving thread with each piece, and with the error that ends a row before its time.
                All rows wait for it to return.
            session: any key. The slot of a request with one stays parked when it ends, and the session's next request
                goes on there, computing only what differs, unless others needed the slot meanwhile.

        Raises:
            EngineFullError: all slots are taken, and as many requests wait as may.

        """
        rows = [Row(number, request, self._tokenizer, deliver, session) for number, request in enumerate(requests)]
        with self._lock:
            busy = len(self._running) + len(self._prefilling) + len(self._arrived)
            if busy >= self.slots + self.queue:
                raise EngineFullError(
                    f"all {self.slots} slots are taken and {busy - self.slots} requests wait, of {self.queue} that "
                    "may; try again later, or load the model with more slots or a longer queue"
                )
            self._arrived.extend(rows)
        return rows

    def step(self, unless: Collection[object] = ()) -> bool:
        """Moves every row on; where another thread drives, waits until it is done.

        Args:
            unless: what the caller waits for; nothing is done once it is not empty.

        Returns:
            Whether there is anything left to do.

        Raises:
            GenerationError: called from within a step, by `deliver` or a logits_processor.

        """
        with self._lock:
            if self._driver == threading.get_ident():
                raise GenerationError("the engine is in the middle of a step; what it calls there must not generate")
            while self._driver and not unless:
                self._lock.wait()
            if unless:
                return True
            self._driver = threading.get_ident()
        try:
            self._step()
        finally:
            with self._lock:
                self._clean()
                self._driver = 0
                self._lock.notify_all()
        return bool(self._running or self._prefilling or self._arrived)

    def cancel(self, rows: Sequence[Row]) -> None:
        """Ends rows; those that have ended stay as they are. Any thread may call it at any time, a finalizer too."""
        self._left.extend(row for row in rows if not row.ended)
        self._clean_if_idle()

    def forget(self, session: object) -> None:
        """Frees the slot that is parked for a session. Any thread may call it at any time, a finalizer too."""
        self._forgotten.append(session)
        self._clean_if_idle()

    def _clean_if_idle(self) -> None:
        """Cleans up, unless somebody drives, who will."""
        with self._lock:
            if not self._driver:
                self._driver = threading.get_ident()
                try:
                    self._clean()
                finally:
                    self._driver = 0
                    self._lock.notify_all()

    def _clean(self) -> None:
        """Takes out what was cancelled and forgotten, and gives back memory that nobody needs; with the lock held."""
        while self._left:
            row = self._left.popleft()
            if row in self._arrived:
                self._arrived.remove(row)
            self._end(row)
        while self._forgotten:
            self._evict(self._forgotten.popleft())
        if self._decoder and not (self._running or self._prefilling):
            if self._parked:
                self._decoder.trim()
            else:
                self._decoder = None

    def _step(self) -> None:
        self._choose()  # for rows whose last step was broken off, as by Ctrl-C
        self._admit()
        self._advance()
        self._prefill()
        self._choose()
        while self._take_ahead():
            self._choose()

    def _admit(self) -> None:
        """Gives slots to rows that wait, and room in the caches; parked slots make way.

        A row leaves the queue last of all, so that Ctrl-C in between loses nobody's.
        """
        while self._arrived and (self._arrived[0].ended or self._arrived[0] in self._prefilling):
            self._arrived.popleft()
        busy = len({*self._running.values(), *self._prefilling})  # Ctrl-C may have left a row in both
        with self._lock:
            rows = list(itertools.islice(self._arrived, self.slots - busy))
        if not rows:
            return
        self._release_nobodys()
        for row in rows:
            row.slot = self._parked.pop(row.session, -1)
        while len(self._parked) + busy + len(rows) > self.slots:
            self._evict(next(iter(self._parked)))
        taken = set(self._decoder.tokens) if self._decoder else set()
        for row in rows:
            if row.slot < 0:
                row.slot = free_place(taken)
                taken.add(row.slot)
        try:
            self._begin(rows)
        except Exception:  # OutOfMemoryError, or what a device says
            for session in list(self._parked):
                self._evict(session)
            for row in rows:
                try:
                    self._begin([row])
                except Exception as error:
                    self._end(row, error)
        for _ in rows:
            self._arrived.popleft()

    def _release_nobodys(self) -> None:
        """Frees slots of rows that were broken off on their way in, as by Ctrl-C."""
        if self._decoder:
            known = {*self._running, *self._parked.values(), *(row.slot for row in self._prefilling)}
            for slot in self._decoder.tokens.keys() - known:
                self._decoder.release(slot)

    def _begin(self, rows: Sequence[Row]) -> None:
        """Plans the rows' prompts; raises where there is no memory for all of them."""
        capacity = max(row.room for row in rows)
        if self._decoder and self._decoder.tokens:
            more = sum(row.slot not in self._decoder.tokens for row in rows)
            self._decoder.reserve(more, capacity, self.slots)
        else:
            self._decoder = None  # what it has is free before more is taken
            self._decoder = self._open(len(rows), capacity)
        for row in rows:
            self._decoder.begin(row.slot, row.request.prompt)
        self._prefilling.extend(rows)

    def _advance(self) -> None:
        """One step of all rows whose last token is not cached yet; those that cross the rope boundary go back first."""
        tokens: dict[int, int] = {}
        for slot, row in list(self._running.items()):
            assert self._decoder
            assert row.pending is not None
            if len(self._decoder.tokens[slot]) == row.length:  # Ctrl-C came when its last one had just been cached
                row.pending = None
                continue
            if not self._decoder.next_chunk(slot) and self._decoder.crosses(slot):
                self._decoder.renew(slot)
            if self._decoder.next_chunk(slot):
                if row not in self._prefilling:
                    self._prefilling.append(row)
                del self._running[slot]
            else:
                tokens[slot] = row.pending
        if not tokens:
            return
        assert self._decoder
        for slot, draft in self._drafts(tokens).items():
            if self._run_ahead(self._running[slot], tokens[slot], draft):
                del tokens[slot]
        if not tokens:
            return
        start = time.perf_counter()
        failed = self._decoder.step(tokens)
        self.account.stepped(len(tokens), time.perf_counter() - start)
        for slot in tokens:
            if slot in failed:
                self._end(self._running[slot], failed[slot])
            else:
                self._running[slot].pending = None

    def _drafts(self, slots: Collection[int]) -> dict[int, list[int]]:
        """Of these slots those whose rows have a draft that pays, with it."""
        assert self._decoder
        drafts: dict[int, list[int]] = {}
        left = 0 if self._prefilling else self._decoder.chunk
        for slot in slots:
            most = min(self._decoder.room_ahead(slot), left - 1)
            if draft := self._running[slot].draft(self.account, most):
                drafts[slot] = draft
                left -= 1 + len(draft)
        return drafts

    def _run_ahead(self, row: Row, token: int, draft: list[int]) -> bool:
        """Runs a row's token and its draft; whether that went well. If not, the row has no more drafts."""
        assert self._decoder
        assert row.speculation
        start = time.perf_counter()
        try:
            self._decoder.run_ahead(row.slot, token, draft)
        except Exception:  # for want of memory; what a single token has to say, its own step says
            row.speculates = False
            return False
        row.pending = None
        row.speculation.passed(draft, time.perf_counter() - start)
        return True

    def _take_ahead(self) -> bool:
        """Takes the last tokens that were run ahead already; whether there were any."""
        taken = False
        for slot, row in self._running.items():
            assert self._decoder
            if row.pending is not None and self._decoder.take_ahead(slot, row.pending):
                row.pending = None
                taken = True
        return taken

    def _prefill(self) -> None:
        """The next chunks, each row's in turn, until they are `prefill_chunk` tokens; one at least."""
        spent = 0
        for _ in range(len(self._prefilling)):
            row = self._prefilling[0]
            assert self._decoder
            size = self._decoder.next_chunk(row.slot)  # 0 where Ctrl-C came right after the last one
            if spent and spent + size > self._decoder.chunk:
                return
            spent += size
            try:
                if size:
                    self._decoder.run_chunk(row.slot)
            except Exception as error:  # ONNX Runtime's exceptions have no common base below this
                self._end(row, error)
                continue
            if self._decoder.next_chunk(row.slot):
                self._prefilling.rotate(-1)
            else:
                self._running[row.slot] = row
                self._prefilling.popleft()

    def _choose(self) -> None:
        """The next token of every row that has logits for it."""
        choices = {slot: row.choice for slot, row in self._running.items() if row.pending is None}
        if not choices:
            return
        assert self._decoder
        tokens: dict[int, int | Exception]
        logits: dict[int, NDArray[np.float32]] = {}
        try:
            tokens = self._decoder.choose(choices)
            if wanted := [slot for slot in choices if self._running[slot].request.logprobs]:
                logits = self._decoder.last_logits(wanted)
        except Exception as error:  # the sampling graph's, on a device
            tokens = dict.fromkeys(choices, error)
        for slot, token in tokens.items():
            row = self._running[slot]
            if isinstance(token, Exception):
                self._end(row, token)
                continue
            try:
                piece = row.add(token, logits.get(slot))
                if piece.result:  # before anybody hears of it, who may want the slot
                    self._end(row)
                row.deliver(piece)
            except Exception as error:  # of the caller's own code
                self._end(row, error)

    def _end(self, row: Row, error: Exception | None = None) -> None:
        """Takes a row out; its slot is free, or parked for its session."""
        if row.ended:
            return
        row.ended = True
        if self._running.get(row.slot) is row:
            del self._running[row.slot]
        elif row in self._prefilling:
            self._prefilling.remove(row)
        if self._decoder and row.slot in self._decoder.tokens:
            self._decoder.drop_ahead([row.slot])
            if error is None and row.session is not None:
                self._evict(row.session)
                self._parked[row.session] = row.slot
            else:
                self._decoder.release(row.slot)
        if error is not None:
            with suppress(Exception):  # there is nobody else to tell
                row.deliver(error)

    def _evict(self, session: object) -> None:
        """Frees a session's parked slot, if it has one."""
        slot = self._parked.pop(session, None)
        if slot is not None and self._decoder:
            self._decoder.release(slot)
