"""Ray Serve on this machine, as a user deploys it: two replicas, the real openai client."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from engines import DEMO_MODEL, PROMPTS, ROOT, engine_process, generate, running

from clasp_vllm.tools.servers import free_port

ENGINE = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8"]
BIN = Path(sys.executable).parent


def run(*command: str, **variables: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | variables, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


class Deployment:
    """A Ray cluster of one node and the example's configuration, made to fit it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "serve.yaml"
        self.port, self.dashboard = free_port(8700), free_port(8270)
        self.agent = f"http://127.0.0.1:{self.dashboard}"

    def deploy(self, num_speculative_tokens: int, **autoscaling: float) -> None:
        config = yaml.safe_load((ROOT / "configs" / "ray" / "serve.yaml").read_text())
        config["http_options"] = {"host": "127.0.0.1", "port": self.port}
        (application,) = config["applications"]
        application["args"] = {
            "model": str(DEMO_MODEL),
            "speculative_config": {
                "method": "clasp",
                "adaptive": False,
                "num_speculative_tokens": num_speculative_tokens,
            },
            "engine_arguments": [*ENGINE, "--kv-cache-memory-bytes", str(128 << 20)],
        }
        (deployment,) = application["deployments"]
        deployment["ray_actor_options"] = {"num_cpus": 1}
        deployment["autoscaling_config"] |= {"min_replicas": 2, "max_replicas": 2} | autoscaling
        deployment["health_check_period_s"] = 2
        self.file.write_text(yaml.safe_dump(config))
        run(str(BIN / "serve"), "deploy", str(self.file), "--address", self.agent)

    def replicas(self) -> dict[str, int]:
        """How many replicas there are in each state."""
        status = yaml.safe_load(run(str(BIN / "serve"), "status", "--address", self.agent))
        application = status["applications"]["clasp"]
        if application["status"] == "DEPLOY_FAILED":
            raise AssertionError(json.dumps(application, indent=1))
        states = application["deployments"].get("OpenAIServer", {}).get("replica_states", {})
        return states if application["status"] == "RUNNING" else states | {"DEPLOYING": 1}

    def wait(self, running: int = 2, timeout_s: float = 300) -> None:
        """Until so many replicas run and nothing else goes on."""
        deadline = time.monotonic() + timeout_s
        while (states := self.replicas()) != {"RUNNING": running}:
            assert time.monotonic() < deadline, states
            time.sleep(2)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="-", max_retries=0)

    def ask(self, prompt: str, stream: bool = False) -> str:
        answer = self.client().completions.create(
            model=str(DEMO_MODEL), prompt=prompt, max_tokens=24, temperature=0.0, stream=stream
        )
        return "".join(part.choices[0].text for part in answer) if stream else answer.choices[0].text


def wait_for(port: int, timeout_s: float = 60) -> None:
    """Until something listens there."""
    deadline = time.monotonic() + timeout_s
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    deployment = Deployment(folder)
    gcs = free_port(6390)
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--port={gcs}", "--num-cpus=4"]
    command += ["--num-gpus=0", f"--dashboard-port={deployment.dashboard}", "--object-store-memory=134217728"]
    replicas = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with (folder / "ray.log").open("w") as log:
        ray = subprocess.Popen(command, env=os.environ | replicas, stdout=log, stderr=log)
    try:
        wait_for(deployment.dashboard)
        deployment.deploy(num_speculative_tokens=3)
        deployment.wait()
        yield deployment
    finally:
        ray.terminate()  # and with it what it has started
        ray.wait(60)


def plain(prompts: list[str]) -> list[str]:
    with running(max_num_seqs=8) as llm:
        return generate(llm, prompts, max_tokens=24, ignore_eos=False).texts


def replica_processes() -> list[int]:
    """Process ids of the replicas' engines' parents, the replicas themselves."""
    import psutil

    names = [(p.pid, " ".join(p.info["cmdline"] or [])) for p in psutil.process_iter(["cmdline"])]
    return [pid for pid, name in names if name.startswith("ray::ServeReplica:clasp:OpenAIServer")]


@pytest.mark.slow
def test_answers_are_plain_vllms(deployed):
    with engine_process("v1") as call:
        expected = call(plain, PROMPTS[:6])
    for stream in (False, True):
        assert [deployed.ask(prompt, stream) for prompt in PROMPTS[:6]] == expected
    models = deployed.client().models.list()
    assert [model.id for model in models] == [str(DEMO_MODEL)]
    with pytest.raises(openai.NotFoundError):
        deployed.client().completions.create(model="other", prompt="a")


@pytest.mark.slow
def test_a_replica_that_dies_is_replaced(deployed):
    expected = {prompt: deployed.ask(prompt) for prompt in PROMPTS[:6]}
    answers, wrong, failed = [], [], []
    stop = threading.Event()

    def load(number: int) -> None:
        while not stop.is_set():
            prompt = PROMPTS[number]
            try:
                answer = deployed.ask(prompt, stream=True)
            except (openai.OpenAIError, httpx.HTTPError) as error:
                failed.append(error)
                continue
            if answer == expected[prompt]:
                answers.append(answer)
            else:  # a stream that was cut off, or nonsense
                (failed if expected[prompt].startswith(answer) else wrong).append(answer)

    threads = [threading.Thread(target=load, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(3)
        before = replica_processes()
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)
        at_death = len(answers)
        time.sleep(5)
        assert len(answers) > at_death  # the other goes on
        deployed.wait()
        assert len(set(replica_processes()) - set(before)) == 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len(failed) <= 6  # at most what was under way on the replica that died


@pytest.mark.slow
def test_a_configuration_is_changed_without_an_error(deployed):
    stop, errors = threading.Event(), []

    def load() -> None:
        while not stop.is_set():
            try:
                deployed.ask(PROMPTS[3])
            except openai.OpenAIError as error:
                errors.append(error)

    before, thread = replica_processes(), threading.Thread(target=load)
    thread.start()
    try:
        deployed.deploy(num_speculative_tokens=5)
        time.sleep(2)
        deployed.wait()
    finally:
        stop.set()
        thread.join()
    assert not errors
    assert set(before).isdisjoint(replica_processes())
    deployed.ask(PROMPTS[3])
    metrics = httpx.get(f"http://127.0.0.1:{deployed.port}/metrics").text
    assert 'num_accepted_tokens_per_pos_total{engine="0",model_name=' in metrics
    assert 'position="4"' in metrics  # the fifth draft token


@pytest.mark.slow
def test_replicas_follow_the_load(deployed):
    expected = deployed.ask(PROMPTS[0])
    stop, wrong = threading.Event(), []

    def load() -> None:
        while not stop.is_set():
            answer = deployed.ask(PROMPTS[0])
            if answer != expected:
                wrong.append(answer)

    bounds = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1}
    deployed.deploy(num_speculative_tokens=5, **bounds, upscale_delay_s=1, downscale_delay_s=5)
    deployed.wait(running=1)
    with ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(load) for _ in range(6)]
        try:
            deployed.wait(running=2)
            time.sleep(5)
        finally:
            stop.set()
        for client in clients:
            client.result()
    deployed.wait(running=1)
    assert not wrong
