"""The vLLM engine in the worker's process (AsyncLLM), with pause, spans per version and weight transfer.

Only this file, vllm_weight_transfer.py, vllm_lora.py and weight_update.py import vLLM.
"""

import asyncio
import gc
import importlib
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from palimpsest.common.config.engines import VllmEngineConfig
from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.common.startup_objects import without_collections
from palimpsest.common.time_limits import limit_s
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.rollout.engine import amx, crash_report, machine, vllm_lora
from palimpsest.services.rollout.engine.logits_processors import refuse_logits_processors
from palimpsest.services.rollout.engine.port import EngineDead, EngineFailed, SampledTokens, StoredWeights, WrongWeights
from palimpsest.services.rollout.engine.process_monitor import EngineMonitor
from palimpsest.services.rollout.engine.vllm_outputs import refuse_routes_of_cpu, to_sampled_tokens
from palimpsest.services.rollout.engine.vllm_weight_transfer import NAME, WRONG_WEIGHTS

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")
SLEEPING = ("weights", "kv_cache")
"""vLLM's tags of what sleeps."""
TIME_LIMIT_S = 120.0
"""Least time limit of pause, load and resume each, in seconds; after it, the engine counts as dead."""


class VllmEngine:
    """See port.py."""

    def __init__(
        self,
        config: VllmEngineConfig,
        *,
        model: str,
        max_tokens: int,
        max_live: int,
        seed: int,
        log: Path,
        adapter: Adapter | None = None,
        routes: bool = False,
    ) -> None:
        """`log`: of crashes. adapter: what the versions are; None: whole weights. routes: whether to return experts."""
        self._adapter = adapter
        self._lora: Any = None
        """vLLM's request for the adapter; None before the first version, and without adapters."""
        self._config, self._model, self._log = config, model, log
        self._max_tokens, self._max_live, self._seed = max_tokens, max_live, seed
        self._routes = routes
        self._amx: amx.Amx | None = None
        """How the CPU engine uses AMX; None: not started, or on a GPU."""
        self._llm: AsyncLLM | None = None
        self._watch: EngineMonitor | None = None
        self._death: asyncio.Task[str] | None = None
        """Collects the crash report of a dead engine."""
        self._asleep: list[str] = []
        """What sleeps, as vLLM's tags: the weights are in host memory, the KV cache is gone."""
        self._scored = 0
        self._waiting: dict[str, Any] = {}
        """vLLM's output collectors, keyed by request."""

    def status(self) -> dict[str, str]:
        return {"kind": "vllm"} | ({"amx": self._amx.value} if self._amx is not None else {})

    async def start(self) -> None:
        refuse_logits_processors()
        self._amx = machine.set_environment(self._config)
        if self._routes and self._amx is not None:
            refuse_routes_of_cpu()
        if self._config.sleep and self._amx is not None:
            machine.refuse_sleep_of_cpu()
        try:
            with without_collections():
                if self._config.sleep:  # heartbeats go on during the import: without them the learner takes its turn
                    await asyncio.to_thread(importlib.import_module, "vllm.v1.engine.async_llm")
                from vllm.config import WeightTransferConfig
                from vllm.distributed.weight_transfer.base import WeightTransferInitRequest
                from vllm.engine.arg_utils import AsyncEngineArgs
                from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise UserError(f"vLLM cannot be imported ({error}): run `make setup`", ExitCode.UNAVAILABLE) from error
        arguments = AsyncEngineArgs(
            model=self._model,
            dtype="bfloat16",
            skip_tokenizer_init=True,  # tokens in, tokens out
            max_model_len=self._max_tokens,
            max_num_seqs=self._max_live,
            max_num_batched_tokens=max(self._config.max_concurrent_tokens, self._max_tokens),
            tensor_parallel_size=self._config.tensor_parallel,
            enable_expert_parallel=self._config.expert_parallel,
            enforce_eager=not self._config.compile,
            logprobs_mode="processed_logprobs",
            weight_transfer_config=WeightTransferConfig(backend=NAME),
            disable_log_stats=True,
            seed=self._seed,
            enable_return_routed_experts=self._routes,
            enable_sleep_mode=self._config.sleep,
            generation_config="vllm",  # ignore the model folder's sampling defaults (top_p, top_k)
            **machine.engine_arguments(self._config, cpu=self._amx is not None),
            **({} if self._adapter is None else vllm_lora.engine_arguments(self._adapter, self._model)),
        )
        self._watch = EngineMonitor(self._log)
        try:
            with self._watch.child_variables():
                # no local variable: imports that failed in vLLM keep this frame, and the engine must end with `close`
                self._llm = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)
            self._watch.watch(self._running.engine_core.resources.engine_manager.processes)
        except Exception as error:
            raise self._startup_error(error) from None
        updates = self._running.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
        await self._run_step("the set-up of weight updates", updates)
        # The first request triggers vLLM's lazy compilation; run it before real requests wait for it.
        await self.generate((1, 2, 3), request="first", temperature=1.0, max_tokens=2, stop=())
        self._watch.doing = "serving"

    async def watch(self) -> NoReturn:
        if self._watch is None:
            raise EngineFailed("the engine is not running")
        await self._watch.gone.wait()
        raise await self._death_error()

    async def generate(
        self, prompt: Sequence[int], *, request: str, temperature: float, max_tokens: int, stop: Sequence[int]
    ) -> SampledTokens:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        sampling = SamplingParams(
            temperature=temperature,
            top_p=1.0,
            logprobs=0,  # of the sampled token only
            max_tokens=max_tokens,
            stop_token_ids=list(stop),
            ignore_eos=True,  # stop tokens say where a message ends
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # of this request alone; a deep copy costs as much as the rest of the request
        )
        return to_sampled_tokens(await self._final(prompt, sampling, request))

    async def pause(self) -> None:
        await self._run_step("pause", self._running.pause_generation(mode="keep", clear_cache=False))
        await self._run_step("delivery", self._drain_outputs())

    async def partial(self, request: str) -> SampledTokens | None:
        from vllm.v1.engine import FinishReason

        processor = self._running.output_processor
        for internal in processor.external_req_ids.get(request, ()):
            # The output that an abort would return now: all tokens and the spans of their versions.
            output = processor.request_states[internal].make_request_output([], None, FinishReason.ABORT, None)
            break
        else:
            # The request ended, but the coroutine of `generate` has not run since.
            output = self._waiting[request].output if request in self._waiting else None
            if isinstance(output, Exception):
                return None
        sampled = to_sampled_tokens(output) if output is not None else None
        return sampled if sampled is not None and sampled.tokens else None

    async def sleep(self) -> None:
        if not self._asleep:
            # Level 1 keeps the weights in host memory: `resume` may have to bring them back.
            await self._run_step("sleep", self._running.sleep(level=1, mode="keep"))
            self._asleep = list(SLEEPING)

    async def _wake(self, *tags: str) -> None:
        """Take the memory back. When nothing sleeps any more, vLLM samples again by itself."""
        if tags := tuple(tag for tag in self._asleep if tag in tags):
            await self._run_step("wake-up", self._running.wake_up(list(tags)))
            self._asleep = [tag for tag in self._asleep if tag not in tags]

    async def load(self, weights: StoredWeights) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._wake("weights")
        if self._adapter is not None:
            await self._load_adapter(weights, self._adapter)
            return
        llm = self._running
        entries = [
            {"name": e.name, "dtype": e.dtype, "shape": list(e.shape), "size": e.size} for e in weights.manifest.tensors
        ]
        update = WeightTransferUpdateRequest(update_info={"path": str(weights.path), "tensors": entries})
        await self._run_step("start of the weight update", llm.start_weight_update())
        size = weights.manifest.full_size
        await self._run_step("weight update", llm.update_weights(update), size)
        finish = llm.finish_weight_update(str(weights.manifest.version))
        await self._run_read_back("end of the weight update", finish, size)
        await self._reset_caches()

    async def _load_adapter(self, weights: StoredWeights, adapter: Adapter) -> None:
        """Replace the adapter. Requests in flight name the same one, so they continue with the new tensors."""
        llm, home = self._running, weights.path.parent
        folder = home.with_name(f"{home.name}-adapter")
        await asyncio.to_thread(vllm_lora.write_folder, weights, adapter, folder)
        await self._run_read_back("adapter update", llm.collective_rpc("load_adapter", args=(str(folder),)))
        await self._run_step("version label", llm.update_weight_version(str(weights.manifest.version)))
        self._lora = vllm_lora.request_for(folder)
        await self._reset_caches()

    async def _run_read_back(self, what: str, step: Coroutine[Any, Any, Any], size: int = 0) -> None:
        """Run a step that compares the loaded weights. Raises WrongWeights if they differ."""
        try:
            await self._run_step(what, step, size)
        except EngineFailed as error:
            _, marked, found = str(error).partition(WRONG_WEIGHTS)
            raise (WrongWeights(found) if marked else error) from None

    async def _reset_caches(self) -> None:
        """Drop cached keys and values, which belong to the previous weights: running requests recompute their
        prefix."""
        await self._run_step("cache reset", self._running.reset_prefix_cache(reset_running_requests=True))

    async def resume(self) -> None:
        await self._wake(*SLEEPING)
        await self._run_step("resume", self._running.resume_generation())

    async def score(self, tokens: Sequence[int]) -> list[float]:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self._scored += 1
        sampling = SamplingParams(
            temperature=1.0,
            max_tokens=1,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # of this request alone; a deep copy costs as much as the rest of the request
        )
        output = await self._run_step("scoring", self._final(tokens, sampling, f"score-{self._scored}"))
        return [by_token[token].logprob for token, by_token in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)]

    async def close(self) -> None:
        if self._llm is not None:
            if self._llm.output_handler is not None and self._llm.output_handler.cancel():
                await asyncio.wait({self._llm.output_handler})  # otherwise it logs the end of its engine as an error
            await asyncio.to_thread(self._llm.shutdown)
            self._llm = None
            await asyncio.sleep(0)  # its tasks end
            gc.collect()  # its destructor fails in an interpreter that ends

    async def _final(self, prompt: Sequence[int], sampling: Any, request: str) -> Any:
        llm = self._running
        try:
            # An input with a type is rendered: vLLM hands others to a thread, for a tokenizer that has nothing to do.
            rendered = {"type": "token", "prompt_token_ids": list(prompt)}
            waiting = await llm.add_request(request, rendered, sampling, lora_request=self._lora)
            self._waiting[request] = waiting
            output = await waiting.get()
        except asyncio.CancelledError:
            await llm.abort(request)
            raise
        except Exception as error:
            if self._is_dead(error):
                raise await self._death_error() from None
            await llm.abort(request)
            raise EngineFailed(f"request {request}: {_full_message(error)}") from error
        finally:
            self._waiting.pop(request, None)
        if not output.finished:
            raise EngineFailed(f"request {request}: the engine ended it without a result")
        return output

    async def _drain_outputs(self) -> None:
        """Wait until all outputs sampled before the pause are processed.

        The engine's process puts the outputs of its steps and then the answer to the pause into one queue, and sends
        them over one socket in this order; one task in this process reads them. Once the pause is answered, the outputs
        are therefore in `outputs_queue` or processed. The task that empties it needs the number of turns computed below
        for one output, without waiting.
        """
        from vllm import envs

        outputs = self._running.engine_core.outputs_queue
        while not outputs.empty():
            await asyncio.sleep(0)
        for _ in range(1 + self._max_live // envs.VLLM_V1_OUTPUT_PROC_CHUNK_SIZE):
            await asyncio.sleep(0)

    async def _run_step(self, what: str, step: Coroutine[Any, Any, T], size: int = 0) -> T:
        """Return the step's result; size: bytes of weights that it moves. Raises EngineDead, else EngineFailed."""
        assert self._watch is not None
        limit = limit_s(TIME_LIMIT_S, size)
        answer, gone = asyncio.create_task(step), asyncio.create_task(self._watch.gone.wait())
        try:
            await asyncio.wait({answer, gone}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if not gone.done():
                self._watch.kill(f"{what}, {limit:.0f} s")
            raise await self._death_error()
        except (EngineFailed, EngineDead):
            raise
        except Exception as error:
            if self._is_dead(error):
                raise await self._death_error() from None
            raise EngineFailed(f"{what}: {_full_message(error)}") from error
        finally:
            answer.cancel()
            gone.cancel()

    def _startup_error(self, error: Exception) -> UserError | EngineDead:
        """Return the error to raise in place of vLLM's startup error."""
        assert self._watch is not None
        evidence = self._watch.failed_start_evidence(error)
        if evidence is None:  # vLLM failed before it started a process of the engine
            return UserError(crash_report.model_refusal_text(self._model, _full_message(error)))
        failure = crash_report.refusal_error(evidence)
        if failure is not None:
            return UserError(crash_report.model_refusal_text(self._model, str(failure)))
        return EngineDead(crash_report.crash_text(evidence))

    def _is_dead(self, error: Exception) -> bool:
        """Whether the engine's death caused the error."""
        from vllm.v1.engine.exceptions import EngineDeadError

        assert self._watch is not None
        return isinstance(error, EngineDeadError) or self._watch.gone.is_set()

    async def _death_error(self) -> EngineDead:
        """Return the error to raise after the engine died."""
        if self._death is None:
            assert self._watch is not None
            self._death = asyncio.create_task(asyncio.to_thread(_post_mortem, self._watch))
        return EngineDead(await asyncio.shield(self._death))

    @property
    def _running(self) -> "AsyncLLM":
        if self._llm is None:
            raise EngineFailed("the engine is not running")
        return self._llm


def _full_message(error: Exception) -> str:
    """Return the error's type and its complete message: the reason is seldom in the first line."""
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}"


def _post_mortem(watch: EngineMonitor) -> str:
    return crash_report.crash_text(watch.collect_evidence())
