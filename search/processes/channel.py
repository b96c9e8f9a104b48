"""The wire between driver, template and trial: length-prefixed JSON objects over a local socket.

A frame is four bytes, big-endian, that hold the length of what follows: one JSON object in UTF-8.
Nothing that arrives is ever unpickled, and a length above ``MAX_FRAME`` is refused before memory is set
aside for it, so the worst that a trial can send is a ``ChannelError``.
"""

from __future__ import annotations

import array
import json
import os
import queue
import select
import signal
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from search.errors import HeldoutError

MAX_FRAME = 64 * 1024 * 1024
_CHUNK = 64 * 1024
_HEADER = struct.Struct("!I")

Body = Mapping[str, Any]


class ChannelError(HeldoutError):
    """What arrived is not a message, or what should be sent cannot be one."""


def encode(body: Body) -> bytes:
    """One frame.

    Raises:
        ChannelError: If the message is larger than ``MAX_FRAME``.
        TypeError: If it holds something that JSON cannot.
    """
    # Escaped to ASCII, so that a lone surrogate (an odd file name in an exception) cannot stop a message.
    text = json.dumps(body, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    if len(text) > MAX_FRAME:
        raise ChannelError(f"a message must fit {MAX_FRAME} bytes, but got {len(text)}: send a file's name instead")
    return _HEADER.pack(len(text)) + text


def _decode(text: bytes) -> dict[str, Any]:
    try:
        body = json.loads(text.decode("utf-8"))
        if b"\\u" in text:
            # JSON may name half of a surrogate pair, which no database or terminal takes.
            body = json.loads(json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise ChannelError(f"a message must be JSON, but got {text[:40]!r} ({error})") from None
    if not isinstance(body, dict):
        raise ChannelError(f"a message must be a JSON object, but got {text[:40]!r}")
    return body


class Receiver:
    """Cuts a stream of bytes into messages, however the bytes were cut on their way."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Add what has arrived."""
        self._buffer += data

    def messages(self) -> Iterator[dict[str, Any]]:
        """Every message that is complete, oldest first.

        Raises:
            ChannelError: After the last good message, if what follows it is not one. The stream is
                unusable from there on.
        """
        while len(self._buffer) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer)
            if not 0 < length <= MAX_FRAME:
                raise ChannelError(f"a message must have 1 to {MAX_FRAME} bytes, but got {bytes(self._buffer[:40])!r}")
            end = _HEADER.size + length
            if len(self._buffer) < end:
                return
            text = bytes(self._buffer[_HEADER.size : end])
            del self._buffer[:end]
            yield _decode(text)


class Link:
    """One end of a socket that never blocks its owner: for the driver and the template.

    Owned by one thread. What cannot be sent at once waits in memory until ``flush`` finds room.

    Args:
        sock: A connected stream socket; the link closes it.
        take_fds: Whether file descriptors that come along are kept, in ``fds``. Never for a trial's link: the
            kernel then closes whatever a trial sends.
    """

    def __init__(self, sock: socket.socket, take_fds: bool = False) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._take_fds = take_fds
        self._receiver = Receiver()
        self._pending: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self.fds: deque[int] = deque()
        self.eof = False

    def fileno(self) -> int:
        """The socket's descriptor, -1 once closed."""
        return self._sock.fileno()

    @property
    def wants_room(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._pending)

    def queue(self, body: Body, fds: tuple[int, ...] = ()) -> None:
        """Send a message now or, what does not fit, later. Takes the descriptors over and closes them."""
        self._pending.append((memoryview(encode(body)), fds))
        self.flush()

    def flush(self) -> None:
        """Send as much as there is room for. A peer that is gone is noticed by ``read``, not here."""
        while self._pending:
            view, fds = self._pending[0]
            try:
                sent = socket.send_fds(self._sock, [view], fds) if fds else self._sock.send(view)
            except BlockingIOError:
                return
            except OSError:
                self._drop_pending()
                return
            # Descriptors travel with the first byte of the frame, so a partial send has sent them all.
            _close_all(fds)
            if sent == len(view):
                self._pending.popleft()
            else:
                self._pending[0] = (view[sent:], ())

    def read(self, limit: int = 1 << 20) -> Iterator[dict[str, Any]]:
        """What has arrived, without waiting; about ``limit`` bytes of it. Sets ``eof`` at the end.

        Raises:
            ChannelError: If what has arrived is not a message.
        """
        taken = 0
        while not self.eof and taken < limit:
            try:
                data = self._receive()
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.eof = True
            taken += len(data)
            self._receiver.feed(data)
            yield from self._receiver.messages()

    def hang_up(self) -> None:
        """Tell the peer that nothing more will come, and go on reading what it says."""
        self._drop_pending()
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        """Close the socket and every descriptor that was on its way."""
        self._drop_pending()
        _close_all(self.fds)
        self.fds.clear()
        self._sock.close()
        self.eof = True

    def _receive(self) -> bytes:
        if not self._take_fds:
            return self._sock.recv(_CHUNK)
        size = array.array("i").itemsize
        data, ancillary, _, _ = self._sock.recvmsg(_CHUNK, socket.CMSG_SPACE(64 * size))
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i", raw[: len(raw) - len(raw) % size])
                for fd in received:
                    os.set_inheritable(fd, False)
                self.fds.extend(received)
        return data

    def _drop_pending(self) -> None:
        for _, fds in self._pending:
            _close_all(fds)
        self._pending.clear()


def wait(links: Iterable[Link], timeout: float, also: int | None = None) -> list[Link]:
    """Wait until a link can be read or written, or the descriptor ``also`` can be read.

    Args:
        links: Those at their end are left out, or they would end every wait at once.
        timeout: Seconds.

    Returns:
        The links that are ready.
    """
    poller = select.poll()
    by_fd = {link.fileno(): link for link in links if not link.eof}
    for fd, link in by_fd.items():
        poller.register(fd, select.POLLIN | (select.POLLOUT if link.wants_room else 0))
    if also is not None:
        poller.register(also, select.POLLIN)
    # Rounded up: rounding down would turn the last millisecond of every wait into a spin.
    ready = poller.poll(max(0, int(timeout * 1000 + 0.999)))
    return [by_fd[fd] for fd, _ in ready if fd in by_fd]


class Channel:
    """A trial's end of its socket to the driver. Any thread may send.

    A reader thread waits for the driver's messages; when the driver's end closes there is nobody left to
    report to, and it kills the trial's whole process group.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="heldout-channel", daemon=True).start()

    def send(self, body: Body) -> None:
        """Send one message to the driver; waits while the driver is busy.

        Raises:
            ChannelError: If the message is too large.
            TypeError: If it holds something that JSON cannot (a NumPy scalar, say).
        """
        data = encode(body)
        with self._lock:
            try:
                self._sock.sendall(data)
            except OSError:
                kill_own_group()

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The driver's next message, or None after ``timeout`` seconds without one."""
        try:
            return self._inbox.get(timeout=timeout)
        except queue.Empty:
            return None

    def _listen(self) -> None:
        receiver = Receiver()
        try:
            while data := self._sock.recv(_CHUNK):
                receiver.feed(data)
                for body in receiver.messages():
                    self._inbox.put(body)
        except (OSError, ChannelError):
            pass
        kill_own_group()


def kill_own_group() -> None:
    """End this trial and all that it started, now."""
    # A trial leads its group; a process that does not would take strangers along.
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
