"""New weights for several servers at once: all of them or none, and never an answer from others than were asked for.

A full update is checked on every server before one parameter is touched, then loaded by all; when one fails, the others
are put back. vLLM carries a label for its weights (GET /weight_info), "default" after a start. While a server loads, its
label says so, so that whatever happens a server with half of the weights or with those of its start is told from one that
can be used. An adapter is loaded under a name of its own for each version: the name in a request is the version.

A label says what a server was told to load. What it computes with is seen in the logprobs of a short text, which must be
the same on all servers after each change, and on one that comes back before it gets requests.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.errors import EngineError, SyncError
from llmrl.fingerprints import weight_files
from llmrl.heads import PREFIX
from llmrl.rollout.http import Refusal, ServerBusy, ServerFault
from llmrl.rollout.server_pool import Member, Pool
from llmrl.rollout.transfer import TransferFolder
from llmrl.rollout.weight_files import VLLM_BACKEND, write_weights
from llmrl.types import PolicyVersion

if TYPE_CHECKING:
    import torch

START = "default"  # vLLM's label of the weights it was started with
_LOADING = "loading-"  # vLLM cannot be told to load again over a load that broke off: the result would be a mixture
HALF_WAY = "an update broke off on it and left a mixture of weights: restart it"
_FAILURES = (ServerFault, ServerBusy, Refusal)
# mean difference in nats of one text on two servers with the same weights: twice what bfloat16 makes it on average between
# two implementations; two servers of one kind differ by far less
_SAME = 0.1
_PROBE_TIMEOUT = 60.0  # of a server that comes back: as long as it is asked, no update can begin
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Held:
    """What every server must hold: whole weights (`folder` None: those of its start) and an adapter by its name."""

    version: PolicyVersion
    base_version: PolicyVersion
    label: str = START
    folder: Path | None = None
    adapter: str | None = None
    adapter_folder: Path | None = None


def how_to_start(model: str, *, adapters: bool = False) -> str:
    """Return the two commands that start a server which takes updates."""
    lora = " --enable-lora" if adapters else ""
    variables = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" if adapters else "VLLM_SERVER_DEV_MODE=1"
    backend = "" if adapters else " --weight-transfer-config '" + json.dumps({"backend": VLLM_BACKEND}) + "'"
    return f"start it with: llmrl serve {model} --sync{lora}\nor with: {variables} vllm serve {model}{lora}{backend}"


Probe = Callable[[Member, Held, float | None], Awaitable[list[float]]]


class Updates:
    """Brings servers from one state to the next.

    Args:
        pool: The servers.
        model: What they were started with, for messages.
        model_folder: Folder with the weights they were started with.
        held: What they hold now.
        transfer: Where weights pass through.
        probe: Returns the logprobs of a short text on a server that holds `Held`, NaN where the model gives none; takes
            at most so many seconds where a number is given.
    """

    def __init__(
        self, pool: Pool, model: str, model_folder: Path, held: Held, transfer: TransferFolder, probe: Probe
    ) -> None:
        self.pool, self.model, self.held = pool, model, held
        self._model_folder, self._transfer, self._probe = model_folder, transfer, probe
        self._right: list[float] | None = None  # the logprobs of a server with the right weights

    # one server

    async def check_means(self, member: Member) -> None:
        """Refuse a server that was started without weight updates; nothing changes on it.

        Raises:
            EngineError: With the command that starts it right.
        """
        try:
            await member.http.get("/weight_info")
            await member.http.post("/init_weight_transfer_engine", {"init_info": {}})
        except _FAILURES as error:
            if isinstance(error, ServerFault) and error.status is None:
                raise EngineError(f"{member.url} cannot be asked for its weights: {error}") from None
            why = "its development endpoints are off" if getattr(error, "status", 0) == 404 else str(error)
            raise EngineError(f"{member.url} takes no new weights ({why})\n{how_to_start(self.model)}") from None

    async def label(self, member: Member) -> str:
        """Return a server's label of its weights."""
        try:
            found = await member.http.get("/weight_info")
        except Refusal:
            raise ServerFault("was restarted without the means for weight updates") from None
        if not isinstance(found, dict) or not isinstance(found.get("weight_version"), str):
            raise ServerFault(f"answered /weight_info with {found!r:.80}")
        return found["weight_version"]

    async def check_answer(self, member: Member, held: Held) -> None:
        """Refuse an answer of a server that does not hold what it was asked for.

        A label only goes back by a restart, so it is asked for after the answer.
        """
        # one without a label takes no weights from anybody
        if held.label != START or member.labelled:
            found = await self.label(member)
            if found == START != held.label:
                raise ServerFault("was restarted and holds its start weights")
            if found != held.label:
                raise ServerFault(f"holds the weights '{found}', expected '{held.label}': somebody else updates it")

    async def restore(self, member: Member) -> None:
        """Give a server that comes back what the others hold, where it does not hold it."""
        await self._look_for_label(member)
        if self.held.label != START or member.labelled:
            found = await self.label(member)
            if found.startswith(_LOADING):
                raise ServerFault(HALF_WAY)
            if found != self.held.label:
                # counted before the new weights are in: what it answered until now was sampled from others
                member.epoch += 1
                await self.pool.whole(self._load(member, self._folder_of(self.held), self.held.label))
            await self._resume(member)
        if self.held.adapter and self.held.adapter not in await served_names(member):
            member.epoch += 1
            await self._load_adapter(member, self.held.adapter, self.held.adapter_folder)
        await self._check_right(member, _PROBE_TIMEOUT)

    async def _check_right(self, member: Member, seconds: float | None) -> None:
        """Refuse a server whose weights are others than its label says."""
        if self._right is None:
            return
        off = _apart(await self._probe(member, self.held, seconds), self._right)
        if off > _SAME:
            raise ServerFault(
                f"gives other logprobs than were seen with the weights '{self.held.label}' (off by {off:.2g} nats): restart "
                "it with the weights and options of the others",
                500,
            )

    async def reset(self, member: Member) -> None:
        """Take back what an earlier run left on a server: its weights, or that it is paused."""
        await self._look_for_label(member)
        if not member.labelled:
            return
        found = await self.label(member)
        if found.startswith(_LOADING):
            raise ServerFault(HALF_WAY)
        if found != START:
            _log.warning("%s holds the weights '%s' of an earlier run; loading its start weights", member.url, found)
            await self.check_means(member)
            await self.pool.whole(self._load(member, self._folder_of(self.held), START))
        await self._resume(member)

    async def _resume(self, member: Member) -> None:
        found = await member.http.get("/is_paused")
        if isinstance(found, dict) and found.get("is_paused"):  # by a client that was killed
            await member.http.post("/resume")

    async def _look_for_label(self, member: Member) -> None:
        try:
            await member.http.get("/weight_info")
            member.labelled = True
        except Refusal:
            member.labelled = False

    async def _transfer_weights(self, member: Member, info: dict[str, Any], label: str | None) -> None:
        http = member.http
        try:
            await http.post("/start_weight_update")
        except ServerFault as fault:
            if fault.status is None or "already active" not in str(fault):
                raise
            await http.post("/finish_weight_update", {})  # of a client that was killed in between
            await http.post("/start_weight_update")
        await http.post("/update_weights", {"update_info": info})
        await http.post("/finish_weight_update", {"weight_version": label} if label else {})

    async def _load(self, member: Member, folder: Path, label: str) -> None:
        http = member.http
        await http.post("/pause?mode=wait")
        await http.post("/update_weight_version", {"new_version": _LOADING + label})
        # the label comes last: until the cache of the old weights is gone, the server is not to be used
        await self._transfer_weights(member, {"folder": str(folder)}, None)
        done = await http.post("/reset_prefix_cache")
        if not isinstance(done, dict) or not done.get("success"):
            raise ServerFault("did not reset its prefix cache, so it would mix old and new weights", 500)
        await http.post("/update_weight_version", {"new_version": label})
        await http.post("/resume")

    async def _load_adapter(self, member: Member, name: str, folder: Path | None) -> None:
        await member.http.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    # all servers

    async def change_weights(self, folder: Path, version: PolicyVersion) -> None:
        """Load a folder of weights into all servers that are up; one that is down takes them when it comes back.

        Raises:
            EngineError: No server is up, or one cannot be updated at all.
            SyncError: One failed or refused; the others hold what they held before.
        """
        members = self._members()
        await asyncio.gather(*(self.check_means(member) for member in members))
        stage = {"folder": str(folder), "stage": True}
        failed = await _try_all(members, lambda m: self._transfer_weights(m, stage, None))
        if failed:
            self._take_out_lost(failed)
            raise SyncError(f"{_told(failed)}; no server has taken any of it")
        label = f"{version.number}-{version.fingerprint}"
        failed = await _try_all(members, lambda m: self._load(m, folder, label))
        if failed:
            raise SyncError(await self._put_back(members, failed))
        held = Held(version, version, label, folder)
        right, failed = await self._compare(members, held)
        if failed:
            raise SyncError(await self._put_back(members, failed, half_way=False))
        self.held, self._right = held, right

    async def _put_back(
        self, members: Sequence[Member], failed: Mapping[Member, Exception], *, half_way: bool = True
    ) -> str:
        """Load what was held before into the servers that took the new weights; return what to tell the caller.

        A server that broke off half-way is left out until it is restarted, and then gets what the others hold; one that
        took all of it gets that, too, and is checked.
        """
        for member, error in failed.items():
            self.pool.take_out(member, f"{error}; {HALF_WAY}" if half_way else str(error))
        rest = [member for member in members if member.up]
        folder = self._folder_of(self.held) if rest else Path()

        async def back(member: Member) -> None:
            await self._load(member, folder, self.held.label)
            await self._check_right(member, None)

        again = await _try_all(rest, back)
        for member, error in again.items():
            self.pool.take_out(member, f"{error}; {HALF_WAY}")
        lost = [member.url for member in members if not member.up and (half_way or member in again)]
        text = _told(failed) + (f"; restart {', '.join(lost)}" if lost else "")
        if again:
            text += f" (going back failed: {_told(again)})"
        number = self.held.version.number
        return f"{text}; " + (f"the others are back at version {number}" if self.pool.up else "no server is left")

    async def change_adapter(self, name: str, folder: Path, version: PolicyVersion) -> None:
        """Load an adapter into all servers that are up, then drop the one before.

        Raises:
            EngineError: No server is up, or one takes no adapters.
            SyncError: One failed; the adapter before is used on, by all.
        """
        members = self._members()
        failed = await _try_all(members, lambda m: self._load_adapter(m, name, folder))
        if failed:
            loaded = [member for member in members if member not in failed]
            await _try_all(loaded, lambda m: m.http.post("/v1/unload_lora_adapter", {"lora_name": name}))
            self._take_out_lost(failed)
            for member, error in failed.items():
                if getattr(error, "status", 0) == 404 and str(error) == "Not Found":
                    start = how_to_start(self.model, adapters=True)
                    raise EngineError(f"{member.url} takes no adapters while it runs\n{start}")
                if "not enabled" in str(error):
                    raise EngineError(
                        f"{member.url} takes no adapters ({error})\n{how_to_start(self.model, adapters=True)}"
                    )
            raise SyncError(f"{_told(failed)}; no server uses the new adapter")
        held = Held(version, self.held.base_version, adapter=name, adapter_folder=folder)
        right, failed = await self._compare(members, held)
        if failed:
            await _try_all(members, lambda m: m.http.post("/v1/unload_lora_adapter", {"lora_name": name}))
            raise SyncError(f"{_told(failed)}; no server uses the new adapter")
        before = self.held.adapter
        self.held, self._right = held, right
        if before:
            await self.drop_adapter(before)

    async def check_same(self) -> None:
        """Refuse servers that compute with different weights under the same name.

        Raises:
            EngineError: With the ones that are off, or that do not answer.
        """
        self._right, failed = await self._compare(self.pool.members, self.held)
        for member, error in failed.items():
            raise EngineError(f"{member.url}: {error}; start all servers with the same weights and options")

    async def _compare(self, members: Sequence[Member], held: Held) -> tuple[list[float], dict[Member, Exception]]:
        """Return the logprobs of the probe with `held`, and the servers that are off; a lost one is taken out, or is off.

        Of several, the server is believed that is nearest to the others.
        """
        found: dict[Member, list[float]] = {}

        async def look(member: Member) -> None:
            found[member] = await self._probe(member, held, None)

        failed = await _try_all(members, look)
        if not found:
            return [], failed
        found = {member: found[member] for member in members if member in found}
        apart = {one: {other: _apart(found[one], found[other]) for other in found} for one in found}
        best = min(found, key=lambda one: sum(off > _SAME for off in apart[one].values()))
        off = {
            member: ServerFault(f"gives other logprobs than {best.url} (off by {apart[best][member]:.2g} nats)", 500)
            for member in found
            if apart[best][member] > _SAME
        }
        return found[best], failed | off

    async def drop_adapter(self, name: str) -> None:
        """Unload an adapter nobody asks for any more; a server that fails at this loses nothing but memory."""
        await _try_all(self.pool.up, lambda m: m.http.post("/v1/unload_lora_adapter", {"lora_name": name}, timeout=10))

    def _members(self) -> list[Member]:
        if not self.pool.up:
            raise EngineError(f"no server is up to take new weights. {self.pool.report()}")
        return self.pool.up

    def _take_out_lost(self, failed: Mapping[Member, Exception]) -> None:
        for member, error in failed.items():
            if isinstance(error, ServerFault) and error.status is None:
                self.pool.take_out(member, f"lost during an update: {error}")

    def _folder_of(self, held: Held) -> Path:
        """Return a folder with the weights of `held`; those of the start are written when first needed."""
        if held.folder is not None:
            return held.folder
        tensors = start_weights(self._model_folder)
        folder = self._transfer.folder(0, sum(tensor.nbytes for tensor in tensors.values()))
        write_weights(folder, tensors)
        return folder


def _apart(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the mean difference of two probes; NaN agrees with NaN only."""
    total = 0.0
    for a, b in zip(one, other, strict=True):
        if math.isnan(a) != math.isnan(b):
            return math.inf
        total += 0.0 if math.isnan(a) else abs(a - b)
    return total / max(1, len(one))


async def served_names(member: Member) -> list[str]:
    """Return the names a server answers to, adapters included."""
    found = await member.http.get("/v1/models")
    try:
        return [card["id"] for card in found["data"]]
    except (KeyError, TypeError):
        raise ServerFault(f"answered /v1/models with {found!r:.80}") from None


def start_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a model folder by their names on disk, without llmrl's heads."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        tensors |= {name: tensor for name, tensor in load_file(file).items() if not name.startswith(PREFIX)}
    return tensors


async def _try_all(members: Sequence[Member], work: Any) -> dict[Member, Exception]:
    """Let every server do it, at the same time; return those that failed, and why."""
    results = await asyncio.gather(*(work(member) for member in members), return_exceptions=True)
    failed: dict[Member, Exception] = {}
    for member, result in zip(members, results, strict=True):
        if isinstance(result, _FAILURES):
            failed[member] = result
        elif isinstance(result, BaseException):
            raise result
    return failed


def _told(failed: Mapping[Member, Exception]) -> str:
    return "; ".join(f"{member.url} did not take the update: {error}" for member, error in failed.items())
