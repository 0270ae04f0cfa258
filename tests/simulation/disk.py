"""A file system in memory. A power cut loses unsynced changes at random."""

import errno
import os
from collections.abc import Callable
from heapq import heappop, heappush
from random import Random

TICK = 4_000_000
"""Nanoseconds. Changes within this time get the same time stamp, as on Linux."""


def error(number: int, path: object) -> OSError:
    """Return an error with the kernel's text."""
    return OSError(number, os.strerror(number), str(path))


class Inode:
    """A file or a folder without its names: its present content, and that on disk."""

    __slots__ = (
        "changed",
        "content",
        "entries",
        "holder",
        "kept",
        "links",
        "number",
        "opens",
        "parts",
        "synced",
        "synced_changed",
    )

    def __init__(self, number: int, changed: int, *, folder: bool) -> None:
        self.number = number
        self.entries: dict[str, Inode] | None = {} if folder else None
        self.kept: dict[str, tuple[int, Inode | None]] = {}
        """The entries of a folder on disk, each with the number of its change."""
        self.content = self.synced = b""
        self.changed = self.synced_changed = changed
        self.links = 0
        self.opens = 0
        self.holder: object | None = None
        """The process that holds its lock."""
        self.parts: object | None = None
        """The processes that the numbers in a task's folder mean; a copy shares them."""


Change = tuple[int, tuple[tuple[Inode, str, Inode | None], ...]]
"""An atomic change of names, with its number."""


class Disk:
    """Files below one root. Failures raise `OSError`."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._free: list[int] = []
        self._highest = 1
        self._count = 0
        self._pending: list[Change] = []
        self._dirty: dict[Inode, None] = {}
        self.full = False
        self.sick = False
        """Whether nothing can be made durable."""
        self.no_inodes = False
        self.root = Inode(1, 0, folder=True)
        self.root.links = 1

    # -- finding

    def find(self, path: str) -> Inode:
        """Return the file or folder at a path."""
        found = self.root
        for part in path.split("/"):
            if part:
                if found.entries is None:
                    raise error(errno.ENOTDIR, path)
                if part not in found.entries:
                    raise error(errno.ENOENT, path)
                found = found.entries[part]
        return found

    def folder_of(self, path: str) -> tuple[Inode, str]:
        """Return the folder of a path, and its last part, which need not exist."""
        before, _, name = path.rpartition("/")
        folder = self.find(before)
        if folder.entries is None:
            raise error(errno.ENOTDIR, path)
        return folder, name

    # -- names

    def make(self, folder: Inode, name: str, *, is_folder: bool = False) -> Inode:
        """Make an empty file or folder. The name must be free."""
        if folder.entries is None:
            raise error(errno.ENOTDIR, name)
        if folder.links == 0:
            raise error(errno.ENOENT, name)  # the folder was removed
        if name in folder.entries:
            raise error(errno.EEXIST, name)
        if self.no_inodes:
            raise error(errno.ENOSPC, name)
        made = Inode(self._new_number(), self._now(), folder=is_folder)
        self._change((folder, name, made))
        return made

    def link(self, folder: Inode, old: str, new: str) -> None:
        """Give a file another name."""
        found = self._entry(folder, old)
        assert folder.entries is not None
        if new in folder.entries:
            raise error(errno.EEXIST, new)
        self._change((folder, new, found))

    def unlink(self, folder: Inode, name: str) -> None:
        """Remove a name. A folder must be empty."""
        found = self._entry(folder, name)
        if found.entries:
            raise error(errno.ENOTEMPTY, name)
        self._change((folder, name, None))

    def rename(self, folder: Inode, old: str, to: Inode, new: str) -> None:
        """Rename a file or a folder, replacing any other with the new name."""
        found = self._entry(folder, old)
        if to.links == 0:
            raise error(errno.ENOENT, new)
        if (folder, old) != (to, new):
            self._change((to, new, found), (folder, old, None))

    def _entry(self, folder: Inode, name: str) -> Inode:
        if folder.entries is None or name not in folder.entries:
            raise error(errno.ENOENT, name)
        return folder.entries[name]

    def _change(self, *entries: tuple[Inode, str, Inode | None]) -> None:
        now = self._now()
        for folder, name, inode in entries:
            assert folder.entries is not None
            old = folder.entries.pop(name, None)
            if inode is not None:
                folder.entries[name] = inode
                inode.links += 1
                inode.changed = now
            if old is not None:
                old.links -= 1
                old.changed = now
                self._free_if_unused(old)
            folder.changed = now
        self._count += 1
        self._pending.append((self._count, entries))

    # -- content

    def write(self, inode: Inode, data: bytes, *, append: bool = False) -> None:
        """Replace the content of a file, or append to it."""
        if self.full and data:
            raise error(errno.ENOSPC, "")
        inode.content = inode.content + data if append else data
        inode.changed = self._now()
        self._dirty[inode] = None

    def open(self, inode: Inode) -> None:
        """Keep a file even if it loses its names."""
        inode.opens += 1

    def close(self, inode: Inode) -> None:
        """Stop keeping an open file."""
        inode.opens -= 1
        self._free_if_unused(inode)

    def sync(self, inode: Inode) -> None:
        """Make the content of a file durable, or the names in a folder."""
        if self.sick:
            raise error(errno.EIO, "")
        if inode.entries is None:
            inode.synced, inode.synced_changed = inode.content, inode.changed
            self._dirty.pop(inode, None)
            return
        later: list[Change] = []
        for change in self._pending:
            if any(folder is inode for folder, _, _ in change[1]):
                self._keep(change)
            else:
                later.append(change)
        self._pending = later

    # -- what happens to the whole

    def lose_power(self, rng: Random) -> None:
        """Become the disk that a machine finds at a boot after a power cut.

        Of the unsynced changes of names, the disk keeps either the first ones, as a journal
        does, or any. It keeps each change whole or not at all. Of unsynced content it may
        keep any part.
        """
        kinds = rng.random()
        if kinds < 0.5:
            for change in self._pending[: rng.randint(0, len(self._pending))]:
                self._keep(change)
        else:
            likely = rng.choice((0.0, 0.2, 0.5, 0.8))
            for change in self._pending:
                if rng.random() < likely:
                    self._keep(change)
        if not self._restore():
            # Two files of one number: a journal would never keep only the second.
            for change in self._pending:
                self._keep(change)
            self._restore()
        self._pending.clear()
        for inode in self._dirty:
            self._tear(inode, rng)
        self._dirty.clear()

    def _restore(self) -> bool:
        """Reset the names to those on disk; return whether they are consistent."""
        found: dict[int, Inode] = {}
        todo = [self.root]
        names: list[tuple[Inode, dict[str, Inode]]] = []
        links: dict[Inode, int] = {self.root: 1}
        while todo:
            folder = todo.pop()
            entries = {n: i for n, (_, i) in folder.kept.items() if i is not None}
            names.append((folder, entries))
            for inode in entries.values():
                links[inode] = links.get(inode, 0) + 1
                if found.setdefault(inode.number, inode) is not inode:
                    return False
                if links[inode] == 1 and inode.entries is not None:
                    todo.append(inode)
        for folder, entries in names:
            folder.entries = entries
        for inode, number in links.items():
            inode.links, inode.opens, inode.holder = number, 0, None
        used = {1, *found}
        self._highest = max(used)
        self._free = sorted(set(range(1, self._highest)) - used)
        return True

    def _tear(self, inode: Inode, rng: Random) -> None:
        before, after = inode.synced, inode.content
        common = len(before) if after.startswith(before) else 0
        chance = rng.random()
        if chance < 0.3:
            found = after
        elif chance < 0.6:
            found = before
        elif chance < 0.8:
            found = after[: rng.randint(common, len(after))]
        else:  # the length is on disk, the blocks are not
            found = after[:common] + bytes(len(after) - common)
        if rng.random() < 0.5:
            inode.changed = inode.synced_changed
        inode.content = inode.synced = found
        inode.synced_changed = inode.changed

    def copy(self, source: Inode, folder: Inode, name: str) -> Inode:
        """Copy a file, or a folder with its content, as ``cp -a`` does."""
        made = self.make(folder, name, is_folder=source.entries is not None)
        made.parts = source.parts
        if source.entries is None:
            self.write(made, source.content)
        for entry, inode in list((source.entries or {}).items()):
            self.copy(inode, made, entry)
        return made

    def remove_all(self, folder: Inode, name: str) -> None:
        """Remove a file, or a folder with its content."""
        found = self._entry(folder, name)
        for entry in list(found.entries or ()):
            self.remove_all(found, entry)
        self.unlink(folder, name)

    def sync_all(self) -> None:
        """Make everything durable."""
        for change in self._pending:
            self._keep(change)
        self._pending.clear()
        for inode in self._dirty:
            inode.synced, inode.synced_changed = inode.content, inode.changed
        self._dirty.clear()

    # -- numbers and times

    def _keep(self, change: Change) -> None:
        number, entries = change
        for folder, name, inode in entries:
            if folder.kept.get(name, (0, None))[0] < number:
                folder.kept[name] = number, inode

    def _now(self) -> int:
        return self._clock() // TICK * TICK

    def _new_number(self) -> int:
        # The lowest free number, as on ext4, so that numbers are reused soon.
        if self._free:
            return heappop(self._free)
        self._highest += 1
        return self._highest

    def _free_if_unused(self, inode: Inode) -> None:
        if inode.links == 0 and inode.opens == 0:
            heappush(self._free, inode.number)
