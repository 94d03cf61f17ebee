"""Several processes at one model: what they tell each other, and what happens when one of them fails or dies.

Every rank runs the same program and meets the others in the same calls, in the same order. Sums are added in
an order that is fixed whatever rank has a part of them, so that results have the same bits for any number of
ranks. What is said goes by gloo, as JSON: nothing is unpickled. Tensors go by nccl on GPUs, and only when
gloo has seen that all ranks are there, since a dead rank closes its connections, which gloo notices at once.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llmsqueeze import errors
from llmsqueeze.computing import computer
from llmsqueeze.device import choose_device, out_of_memory
from llmsqueeze.errors import (
    EnvironmentFault,
    LlmsqueezeError,
    RankLost,
    RecipeError,
    ResourceError,
)
from llmsqueeze.world import World

T = TypeVar("T")

# A rank that is gone is noticed by its connections; this is for machines that can no longer be reached, and
# longer than the first one may take to fetch a model while the others wait.
TIMEOUT = datetime.timedelta(days=3)
# How long the first rank waits for the others to let go of files that it is about to remove.
LEAVE_SECONDS = 5.0
FAILED, LEFT = "failed", "left-{}"


class Team:
    """What a rank needs of the others. size: 1 makes every call return at once.

    A call raises what another rank raised instead of meeting it, and RankLost when one is gone.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size = rank, size
        self._store = store

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that prints, publishes and keeps the lock."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """What every rank gives, by rank. In plain types, as JSON has them."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with self._meeting():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([data.numel()]))
            longest = max(int(size) for size in sizes)
            texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(texts, torch.nn.functional.pad(data, (0, longest - data.numel())))
        found = zip(texts, sizes, strict=True)
        return [json.loads(text[: int(size)].numpy().tobytes()) for text, size in found]

    def lead(self, act: Callable[[], None]) -> None:
        """Let the first rank do it; the others wait, and raise what it raises."""
        failure = None
        if self.leads:
            try:
                act()
            except Exception as error:
                failure = error
        told = self.gather(failure and self._told(failure))[0]
        if failure:
            raise failure
        if told:
            raise _heard(told)

    def conclude(self) -> None:
        """Wait for the first rank, which has done what cannot fail any more whoever is lost."""
        try:
            self.gather(None)
        except LlmsqueezeError:
            if not self.leads:
                raise

    def first(self, act: Callable[[], T]) -> T:
        """Let the first rank do it, then all others: they find what it has fetched or made."""
        if self.leads:
            found = act()
            self.gather(None)
        else:
            self.gather(None)
            found = act()
        return found

    def send(self, tensor: Tensor, owner: int) -> None:
        """Give every rank the owner's tensor, in place. Contiguous, and of the same shape on all."""
        if self.size > 1 and tensor.numel():
            with self._meeting():
                _all_there(tensor)
                dist.broadcast(_bytes(tensor), owner)

    def add(self, tensor: Tensor) -> None:
        """Put the sum of what all ranks have into `tensor`, contiguous, in place. In an order that is not
        said: for integers, or where no number is other than 0 on more than one rank."""
        if self.size > 1 and tensor.numel():
            with self._meeting():
                _all_there(tensor)
                dist.all_reduce(tensor)

    def deal(self, given: list[Tensor]) -> Tensor:
        """What the ranks have given to this one, by rank. given: a flat tensor to each, of one dtype and
        device."""
        if self.size == 1:
            return given[0]
        counts = [each[self.rank] for each in self.gather([part.numel() for part in given])]
        flat = torch.cat(given)
        found = flat.new_empty(sum(counts))
        item = flat.element_size()
        with self._meeting():
            _all_there(flat)
            dist.all_to_all_single(
                _bytes(found), _bytes(flat),
                [count * item for count in counts], [part.numel() * item for part in given],
            )  # fmt: skip
        return found

    def share(self, own: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """What any rank has, by names that no other has: on all of them, on `device`, by rank."""
        told: list[dict[str, Any]] = self.gather(
            {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in own.items()}
        )
        found = {}
        for owner, each in enumerate(told):
            for name, (shape, dtype) in each.items():
                if owner == self.rank:
                    found[name] = own[name].to(device).contiguous()
                else:
                    found[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
                self.send(found[name], owner)
        return found

    def slices(self, size: int) -> list[slice]:
        """Numbers of a flat tensor that each rank adds up."""
        cuts = [size * rank // self.size for rank in range(self.size + 1)]
        return [slice(begin, end) for begin, end in itertools.pairwise(cuts)]

    def scatter(self, tensor: Tensor) -> Tensor:
        """[ranks, own slice]: what every rank has there. tensor: contiguous, of the same size on all."""
        flat = tensor.reshape(-1)
        lengths = [part.stop - part.start for part in self.slices(flat.numel())]
        own = lengths[self.rank]
        found = flat.new_empty(self.size, own)
        item = tensor.element_size()
        with self._meeting():
            _all_there(flat)
            dist.all_to_all_single(
                _bytes(found), _bytes(flat), [own * item] * self.size, [n * item for n in lengths]
            )
        return found

    def collect(self, own: Tensor, like: Tensor) -> None:
        """Put every rank's slice into `like`, contiguous, in place."""
        flat = like.view(-1)
        for rank, part in enumerate(self.slices(flat.numel())):
            if rank == self.rank:
                flat[part] = own
            self.send(flat[part], rank)

    def leave_files(self, error: BaseException) -> None:
        """Wait, but not long, until the other ranks write nothing any more, since this one has failed."""
        if self.size == 1:
            return
        self.say_failed(error)
        until = time.monotonic() + LEAVE_SECONDS
        names = [LEFT.format(rank) for rank in range(1, self.size)]
        with contextlib.suppress(RuntimeError):  # the store may be gone with the rank that had it
            while not self._store.check(names) and time.monotonic() < until:
                time.sleep(0.02)

    def failed(self) -> Exception | None:
        """What a rank said before it ended."""
        try:
            told = self._store.get(FAILED) if self._store.check([FAILED]) else None
        except RuntimeError:
            return None
        return _heard(json.loads(told)) if told else None

    def say_failed(self, error: BaseException) -> None:
        """Let the others know why this rank will not meet them any more. The first to say so is heard."""
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(FAILED, "", json.dumps(self._told(error)))
        dist.destroy_process_group()  # what the others wait for fails now

    def say_left(self) -> None:
        """Let the first rank know that this one writes nothing any more."""
        with contextlib.suppress(RuntimeError):
            self._store.set(LEFT.format(self.rank), "1")

    def _told(self, error: BaseException) -> dict[str, Any]:
        error = _plain(error)
        return {"rank": self.rank, "kind": type(error).__name__, "message": str(error)}

    @contextlib.contextmanager
    def _meeting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            reason = str(error).splitlines()[0].rpartition("] ")[2]
            raise self.failed() or RankLost(
                f"a rank was lost ({reason.partition('. ')[0]}); the same command goes on from the last "
                "state that was kept"
            ) from error


ALONE = Team()


def own_device(name: str, world: World, gpus: int | None) -> torch.device:
    """What --device means for one of several ranks: each takes a GPU of its own.

    gpus: how many were asked for. EnvironmentFault when there are fewer.
    """
    where = choose_device(name)
    count = torch.cuda.device_count()
    if where.type == "cpu":
        if gpus is not None and name != "cpu":
            raise EnvironmentFault(
                f"--gpus {gpus}: this torch ({torch.__version__}) sees {count} GPUs; with --device cpu there "
                "are as many ranks on the CPU"
            )
        return where
    if world.size == 1:
        return where
    if where.index is not None:
        raise RecipeError(
            f"--device {name}: each of {world.size} ranks takes a GPU of its own; use --device cuda, and "
            "CUDA_VISIBLE_DEVICES to choose them"
        )
    if world.local_size > count:
        raise EnvironmentFault(
            f"{world.local_size} ranks: this torch ({torch.__version__}) sees {count} GPUs"
        )
    return torch.device("cuda", world.local_rank)


@contextlib.contextmanager
def joined(world: World, device: torch.device) -> Iterator[Team]:
    """This process as one of `world`. device: of its tensors. EnvironmentFault where ranks' are unlike."""
    if world.size == 1:
        yield ALONE
        return
    if not dist.is_available():
        raise EnvironmentFault("this torch was built without torch.distributed; use one GPU")
    team = _meet(world, device)
    try:
        _check_alike(team.gather(computer(device)))
        yield team
        dist.destroy_process_group()
    except BaseException as error:
        # torchrun's signal may be quicker than the news of why it was sent.
        heard = None if isinstance(error, Exception) else team.failed()
        if dist.is_initialized():
            team.say_failed(error)
        if heard and not isinstance(heard, RankLost):
            raise heard from error
        raise
    finally:
        team.say_left()


def _meet(world: World, device: torch.device) -> Team:
    if world.meeting:
        store: Any = dist.FileStore(world.meeting, world.size)
        # All on this machine: nobody else needs to reach them.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    else:
        store, _, _ = next(dist.rendezvous("env://", world.rank, world.size))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("ranks", store),
            rank=world.rank,
            world_size=world.size,
            timeout=TIMEOUT,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RankLost(f"the ranks do not find each other ({reason}); start again") from error
    return Team(world.rank, world.size, dist.PrefixStore("said", store))


def _check_alike(computers: list[dict[str, str]]) -> None:
    """Or the result would depend on which rank does what."""
    for rank, found in enumerate(computers):
        for name in sorted({*found, *computers[0]}):
            one, other = found.get(name), computers[0].get(name)
            if one != other:
                raise EnvironmentFault(
                    f"rank {rank} has {name} {one}, rank 0 {other}; results depend on it: let ranks be alike"
                )


def _heard(told: dict[str, Any]) -> Exception:
    """The error that another rank told of."""
    kind = getattr(errors, told["kind"], None)
    if isinstance(kind, type) and issubclass(kind, LlmsqueezeError):
        return kind(told["message"])
    return RuntimeError(f"rank {told['rank']}: {told['kind']}: {told['message']}")


def _plain(error: BaseException) -> BaseException:
    """What other ranks are told: failures of the machine as errors that they know."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return RankLost(
            "a rank was interrupted; the same command goes on from the last state that was kept"
        )
    if out_of_memory(error):
        return ResourceError("out of memory; try smaller --samples, --seqlen or --batch-size")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceError("no space left on the disk; nothing was published")
    return error


def _all_there(tensor: Tensor) -> None:
    """Before a tensor goes by nccl, which would wait for a dead rank."""
    if tensor.is_cuda:
        dist.all_reduce(torch.zeros(1))


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory: not every backend knows every dtype."""
    return tensor.view(-1).view(torch.uint8)


def shared_out(costs: Sequence[int], size: int) -> list[int]:
    """Which rank is to do each of some tasks: the next dearest always goes to the one with least to do."""
    loads = [0] * size
    owners = [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda task: (-costs[task], task)):
        owners[task] = min(range(size), key=lambda rank: (loads[rank], rank))
        loads[owners[task]] += costs[task]
    return owners
