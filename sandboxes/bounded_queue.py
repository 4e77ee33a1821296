"""A queue that makes its writers wait while it is full, and lets readers give back what they could not do."""

import threading
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class BoundedQueue(Generic[Item]):
    """First in, first out. Once closed it takes nothing new, and what is left in it can still be read."""

    def __init__(self, max_items: int) -> None:
        if max_items < 1:
            raise ValueError(f"max_queued must be >= 1, got {max_items}")
        self._max_items = max_items
        self._items: deque[Item] = deque()
        self._is_closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Item) -> bool:
        """Wait for room; False when the queue is closed, or is closed meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self._items) < self._max_items)
            if not self._is_closed:
                self._items.append(item)
                self._changed.notify_all()
            return not self._is_closed

    def put_back(self, item: Item) -> None:
        """Before all others, whether there is room or not: it had its turn already."""
        with self._changed:
            self._items.appendleft(item)
            self._changed.notify_all()

    def get(self) -> Item | None:
        """Wait for an item; None when the queue is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or bool(self._items))
            item = self._items.popleft() if self._items else None
            self._changed.notify_all()
            return item

    def close(self) -> bool:
        """False when it was closed before."""
        with self._changed:
            was_open, self._is_closed = not self._is_closed, True
            self._changed.notify_all()
            return was_open

    def take_all(self) -> list[Item]:
        """What is left, which is then gone."""
        with self._changed:
            items = list(self._items)
            self._items.clear()
            return items
