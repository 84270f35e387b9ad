"""Environments of verifiers 0.4, whose API is `verifiers.v1`; verifiers_worker.py imports this file.

In that API, an agent is a program that requests replies from an endpoint. Ours is `PolicyHarness`, a chat in this
process: the task's prompt, the policy's replies (from `ReplyEndpoint`), and the tools of the task's MCP servers.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import verifiers.v1 as vf
from verifiers.v1.configs.agent import agent_config_fields
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.compaction import bound_tool_message
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp
from verifiers.v1.utils import loaders

from icrl_megatron.tasks.reply_endpoint import NO_TURNS, ReplyEndpoint, flat
from icrl_megatron.tasks.stepped_rollout import WaitingModel

Json = dict[str, Any]
HARNESS = "icrl_megatron_policy"
KEY = "ICRL_MEGATRON_API_KEY"  # verifiers hides variables with API_KEY in their names from tools


class PolicyHarness(vf.Harness[vf.HarnessConfig]):
    APPENDS_SYSTEM_PROMPT = SUPPORTS_MCP = SUPPORTS_RESUME = True
    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: dict[str, str], data: Any
    ) -> Any:
        """One turn of the user, up to a reply without calls."""
        system, prompt = self.resolve_prompt(data)
        given = [vf.UserMessage(content=prompt)] if isinstance(prompt, str) else prompt or []
        messages = [{"role": "system", "content": system}] if system else []
        messages += [message_to_wire(message) for message in given]
        servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        async with AsyncExitStack() as stack:
            timeout = aiohttp.ClientTimeout(total=None)  # a reply waits for our side, which has its own limits
            session = aiohttp.ClientSession(headers={"Authorization": f"Bearer {secret}"}, timeout=timeout)
            http = await stack.enter_async_context(session)
            tools, dispatch, opened = await connect_mcp({"mcpServers": servers}, stack)
            body = {"model": ctx.model, "messages": messages, **({"tools": tools} if tools else {})}
            while True:
                async with http.post(f"{endpoint}/chat/completions", json=body) as answer:
                    text = await answer.text()
                if answer.status != 200:
                    over = NO_TURNS in text or trace.stop_condition is not None
                    return vf.ProgramResult(exit_code=0 if over else 1, stdout="", stderr=text)
                messages.append(said := json.loads(text)["choices"][0]["message"])
                if not said.get("tool_calls"):
                    return vf.ProgramResult(exit_code=0, stdout="", stderr="")
                for call in said["tool_calls"]:
                    name = call["function"]["name"]
                    found: Any = f"error: unknown tool {name!r}"
                    if name in dispatch:
                        found = await call_mcp(opened, dispatch, name, json.loads(call["function"]["arguments"]))
                    result = {"role": "tool", "tool_call_id": call["id"], "content": found, "name": name}
                    messages.append(bound_tool_message(result))


class UnboundedTasks(Sequence[Any]):
    """Tasks that a taskset generates without end; holds those that were requested."""

    def __init__(self, taskset: Any) -> None:
        self._more: Iterator[Any] = iter(taskset)
        self._made: list[Any] = []

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, i: Any) -> Any:
        while len(self._made) <= i:
            self._made.append(next(self._more))
        return self._made[i]


class LoadedV1:
    def __init__(self, made: Any, url: str, endpoint: ReplyEndpoint, serving: AsyncExitStack) -> None:
        self._made, self._endpoint, self._serving = made, endpoint, serving  # its servers live as long as this
        self._context = vf.ModelContext("policy", vf.EvalClientConfig(base_url=url, api_key_var=KEY))
        self.endless = not made.taskset.bounded
        tasks = UnboundedTasks(made.taskset) if self.endless else list(made.taskset)
        self.data = {"train": tasks, "heldout": tasks}  # a taskset has no splits

    def content(self, task: Any) -> Json:
        found: Json = task.data.model_dump(mode="json", exclude={"idx"})
        return found

    async def play(self, task: Any, model: WaitingModel) -> Json:
        begun: list[str] = []

        def begin(trace: Any) -> None:
            begun.append(trace.id)
            self._endpoint.models[trace.id] = model

        try:
            episode = await self._made.run_episode(task, self._context, on_trace=begin)
        finally:
            for number in begun:
                self._endpoint.models.pop(number, None)
        if not episode.ok:
            last = [*(error for trace in episode.traces for error in trace.errors), *episode.errors][-1]
            raise RuntimeError(f"the rollout ended with {last.type}: {last.message}")
        if len(episode.traces) != 1:
            raise RuntimeError(f"the environment played {len(episode.traces)} rollouts of its agent, not 1")
        (trace,) = episode.traces
        if trace.is_timeout:
            raise RuntimeError(f"the rollout ended at a timeout of the environment's own ({trace.stop_condition})")
        rewards = {name: reward.score for name, reward in trace.rewards.items() if reward is not None}
        if not rewards:
            raise RuntimeError("the environment gave no reward")
        said = [flat(message_to_wire(message)) for message in trace.branches[-1].messages] if trace.branches else []
        measured = {name: value for name, value in trace.metrics.items() if value is not None}
        return {"completion": said, "reward": trace.reward, "metrics": {**measured, **rewards}}


async def load(name: str, args: Json, make: Any) -> LoadedV1:
    """`name`: the id of a taskset. `args`: the settings of its environment, as in the `env` block of verifiers."""
    if make:
        raise ValueError("verifiers.v1 has no functions that make environments; give the id of a taskset")
    module = types.ModuleType(HARNESS)
    module.__spec__ = importlib.machinery.ModuleSpec(HARNESS, None)
    module.__dict__.update(PolicyHarness=PolicyHarness, __all__=["PolicyHarness"])
    sys.modules[HARNESS] = module  # where verifiers looks a harness up by its id
    if loaders.default_harness_id(name) == name:
        raise ValueError("it has its own agent (a harness), so the model cannot play it")
    kind = loaders.env_config_type(name, args.get("id", ""))
    agents = agent_config_fields(kind(taskset={**args.get("taskset", {}), "id": name}))
    if len(agents) != 1:
        raise ValueError(f"it has the agents {', '.join(agents)}; only environments with one agent can be played")
    (agent,) = agents
    if "harness" in args.get(agent, {}):
        raise ValueError(f"args.{agent}.harness has no effect: the model that is trained is the agent; leave it out")
    # Processes of tools run elsewhere, and find modules in the folder of the command too.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(Path.cwd()))))
    ours = {"harness": {"id": HARNESS}, "runtime": {"type": "subprocess"}}
    settings = {**args, "taskset": {**args.get("taskset", {}), "id": name}, agent: {**args.get(agent, {}), **ours}}
    settings.setdefault("interception", {"type": "server"})
    endpoint = ReplyEndpoint(KEY)
    made = loaders.load_environment(loaders.resolve_env_config(settings))
    await (serving := AsyncExitStack()).enter_async_context(made.serving())
    return LoadedV1(made, await endpoint.start(), endpoint, serving)
