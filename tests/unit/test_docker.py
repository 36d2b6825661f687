"""docker/ against the repository and vLLM: paths, who finds whom, and the dashboard's metrics."""

import ast
import json
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from engines import ROOT

from clasp_vllm.drafting.statistics import COUNTERS, GAUGES

DOCKER = ROOT / "docker"
DASHBOARD = DOCKER / "grafana" / "dashboards" / "clasp_vllm.json"
DOCKERFILES = ["Dockerfile", "Dockerfile.cpu"]
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+[\w.-]*")
SECRET = re.compile("PASSWORD|TOKEN|SECRET|KEY")


def instructions(name: str) -> list[list[str]]:
    """[instruction, arguments] of a Dockerfile."""
    lines = [line for line in (DOCKER / name).read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    return [line.split(maxsplit=1) for line in joined.splitlines() if line]


def arguments(name: str, instruction: str) -> list[str]:
    return [rest for keyword, rest in instructions(name) if keyword == instruction]


def copied(name: str) -> set[str]:
    return {source for rest in arguments(name, "COPY") for source in rest.split()[:-1]}


def load(name: str) -> dict:
    return yaml.safe_load((DOCKER / name).read_text())


def interpolate(text: str, **variables: str) -> str:
    """As Compose does with ${NAME:-default}."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: variables.get(match[1], match[2]), text)


COMPOSE, GPU = load("compose.yaml")["services"], load("compose.gpu.yaml")["services"]
SERVERS = [COMPOSE["server"], GPU["server"]]


# --- images


def test_what_is_copied_exists_and_is_all_that_docker_gets():
    sources = set().union(*map(copied, DOCKERFILES))
    assert [source for source in sources if not (ROOT / source).exists()] == []
    patterns = re.findall("^[^#].*", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert patterns[0] == "*"
    assert {pattern[1:] for pattern in patterns if pattern.startswith("!")} == sources


@pytest.mark.parametrize("name", DOCKERFILES)
def test_image(name):
    (base,) = arguments(name, "FROM")
    assert PINNED.fullmatch(base)
    assert {"README.md", "pyproject.toml", "setup.py", "clasp_vllm"} <= copied(name)
    assert int(arguments(name, "USER")[-1]) > 0
    assert json.loads(arguments(name, "ENTRYPOINT")[-1]) == ["vllm", "serve"]
    (volume,) = arguments(name, "VOLUME")
    assert COMPOSE["server"]["volumes"] == [f"cache:{volume}"]
    assert not [rest for _, rest in instructions(name) if SECRET.search(rest)]


@pytest.fixture(params=[200, 503, None])
def answer(request):
    """(port, status): what a server there answers on /health; None = there is no server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(request.param if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    if request.param is None:
        server.server_close()
        yield server.server_port, None
        return
    with server:
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        yield server.server_port, request.param
        server.shutdown()


@pytest.mark.parametrize("name", DOCKERFILES)
def test_healthcheck(name, answer):
    port, status = answer
    (check,), (exposed,) = arguments(name, "HEALTHCHECK"), arguments(name, "EXPOSE")
    python, *options, code = json.loads(check.split("CMD", 1)[1])
    assert python == "python3"
    assert code.count(exposed) == 1
    command = [sys.executable, *options, code.replace(exposed, str(port))]
    result = subprocess.run(command, stderr=subprocess.DEVNULL, timeout=30, check=False)
    assert (result.returncode == 0) == (status == 200)


# --- Compose


def test_keys():
    """What Compose's schema would say of a key that is misspelt."""
    assert load("compose.yaml").keys() == {"name", "services", "volumes"}
    assert load("compose.gpu.yaml").keys() == {"services"}
    known = {"image", "build", "command", "environment", "healthcheck", "deploy", "restart"}
    known |= {"ports", "volumes", "shm_size", "cap_add", "security_opt"}
    for service in [*COMPOSE.values(), *GPU.values()]:
        assert service.keys() <= known
        assert service.get("healthcheck", {}).keys() <= {"test", "interval", "timeout"}


def test_images_are_pinned_and_watched():
    assert {service["image"] for service in SERVERS} == {"clasp-vllm:cpu", "clasp-vllm:cuda"}
    assert (DOCKER / COMPOSE["server"]["build"]["context"]).resolve() == ROOT
    built = [service["build"]["dockerfile"] for service in SERVERS]
    assert sorted(built) == [f"docker/{name}" for name in DOCKERFILES]
    for name in ("prometheus", "grafana"):
        assert PINNED.fullmatch(COMPOSE[name]["image"])
        assert COMPOSE[name]["healthcheck"]["test"][0] == "CMD"


def test_mounts():
    volumes = load("compose.yaml")["volumes"].keys()
    for service in COMPOSE.values():
        for mount in service["volumes"]:
            source, _, *options = mount.split(":")
            if source.startswith("."):
                assert (DOCKER / source).exists(), source
                assert options == ["ro"]
            else:
                assert source in volumes


def test_ports_are_published_on_this_machine_only():
    published = {name: [interpolate(port) for port in service["ports"]] for name, service in COMPOSE.items()}
    assert published == {
        "server": [f"127.0.0.1:8000:{arguments('Dockerfile', 'EXPOSE')[0]}"],
        "prometheus": ["127.0.0.1:9090:9090"],
        "grafana": ["127.0.0.1:3000:3000"],
    }


def test_secrets_come_from_the_environment():
    secrets = {
        name: value
        for service in [*COMPOSE.values(), *GPU.values()]
        for name, value in service.get("environment", {}).items()
        if SECRET.search(name)
    }
    assert secrets.pop("GF_SECURITY_ADMIN_PASSWORD").startswith("${GF_SECURITY_ADMIN_PASSWORD:?")
    assert secrets == {"HF_TOKEN": None, "VLLM_API_KEY": None}  # None: passed on


@pytest.mark.parametrize("server", SERVERS, ids=["cpu", "gpu"])
def test_command(server):
    model, option, config = shlex.split(interpolate(server["command"]))
    assert option == "--speculative-config"
    inside = copied(Path(server["build"]["dockerfile"]).name)
    for path in [config, model] if server is COMPOSE["server"] else [config]:
        assert (ROOT / path).exists(), path
        assert any(Path(path).is_relative_to(source) for source in inside), path
    given = {"CLASP_MODEL": "m", "CLASP_CONFIG": '{"method": "clasp"}', "CLASP_ARGUMENTS": "--dtype auto"}
    command = shlex.split(interpolate(server["command"], **given))
    assert command == ["m", option, '{"method": "clasp"}', "--dtype", "auto"]


def test_who_finds_whom():
    prometheus, (datasource,) = load("prometheus.yml"), load("grafana/datasource.yaml")["datasources"]
    assert prometheus["scrape_configs"][0]["static_configs"] == [{"targets": ["server:8000"]}]
    assert datasource["url"] == "http://prometheus:9090"
    assert datasource["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    (provider,) = load("grafana/dashboards.yaml")["providers"]
    folder = provider["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in COMPOSE["grafana"]["volumes"]
    home = COMPOSE["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/{DASHBOARD.name}"


# --- the dashboard

BOARD = json.loads(DASHBOARD.read_text())
TARGETS = [(panel, target) for panel in BOARD["panels"] for target in panel.get("targets", [])]
SELECTOR = '{model_name=~"$model_name", engine=~"$engine"}'
LABELLED = {
    "le": "_bucket",
    "position": "_per_pos_total",
    "task": "_prompts_total",
    "layer": "_skipped_total",
}
SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}

# vLLM's sources are read and not imported, which would take half a minute.
VLLM = Path(find_spec("vllm").submodule_search_locations[0])
LOGGERS = (VLLM / "v1" / "metrics" / "loggers.py").read_text()
SPECULATION = (VLLM / "v1" / "spec_decode" / "metrics.py").read_text()
OURS = (ROOT / "clasp_vllm" / "engine" / "metrics.py").read_text()


def nodes(source: str, kind: type) -> list:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, kind)]


def our_metrics() -> dict[str, str]:
    """Kind by name."""
    kinds = {}
    for call in nodes(OURS, ast.Call):
        kind = getattr(call.func, "id", "").lower()
        if kind in SUFFIXES:
            name = call.args[0]
            if isinstance(name, ast.Constant):
                names = [name.value]
            else:  # f"prefix{name}"
                names = [name.values[0].value + part for part in (COUNTERS if kind == "counter" else GAUGES)]
            kinds |= dict.fromkeys(names, kind)
    return kinds


def vllm_metrics() -> dict[str, str]:
    """Kind by name."""
    kinds = {}
    for call in nodes(LOGGERS, ast.Call):
        kind = re.fullmatch("_(counter|gauge|histogram)_cls", getattr(call.func, "attr", ""))
        name = next((keyword.value for keyword in call.keywords if keyword.arg == "name"), None)
        if kind and isinstance(name, ast.Constant):
            kinds[name.value] = kind[1]
    # There the names are in lists, and all are counters.
    assert set(re.findall(r"\w+_cls\b", SPECULATION)) == {"_counter_cls"}
    names = [node.value for node in nodes(SPECULATION, ast.Constant) if isinstance(node.value, str)]
    return kinds | {name: "counter" for name in names if re.fullmatch(r"vllm:\w+", name)}


def exported(metrics: dict[str, str]) -> dict[str, str]:
    """Kind by name on /metrics."""
    return {name + suffix: kind for name, kind in metrics.items() for suffix in SUFFIXES[kind]}


METRICS = exported(our_metrics()) | exported(vllm_metrics())


@pytest.mark.parametrize(
    "target", [target for _, target in TARGETS], ids=[f"{p['title']} {t['refId']}" for p, t in TARGETS]
)
def test_expression(target):
    expression = target["expr"]
    used = re.findall(r"(?:\b(\w+)\()?(vllm:\w+)(\{[^}]*\})?(\[[^\]]*\])?", expression)
    assert used
    for function, name, selector, span in used:
        assert selector == SELECTOR
        if METRICS[name] == "gauge":
            assert function in ("", "sum")
            assert not span
        else:
            assert (function, span) in [("rate", "[$__rate_interval]"), ("increase", "[$__range]")]
    assert expression.count("(") == expression.count(")")
    labels = re.findall(r"by \((\w+)\)", expression) + re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
    for label in labels:
        assert label == "le" or f'"{label}"' in OURS + LOGGERS + SPECULATION
        assert used[0][1].endswith(LABELLED.get(label, ""))
    assert ("histogram_quantile" in expression) == ("le" in labels)


def test_all_our_metrics_are_shown():
    shown = set(re.findall(r"vllm:\w+", " ".join(target["expr"] for _, target in TARGETS)))
    ours = our_metrics().items()
    assert [name for name, kind in ours if shown.isdisjoint(exported({name: kind}))] == []


def test_variables():
    variables = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD)))
    assert {name for name in used if not name.startswith("__")} == variables.keys()
    for name in ("model_name", "engine"):
        metric = re.match(rf"label_values\((vllm:\w+).*, {name}\)$", variables[name]["query"]["query"])[1]
        assert metric in METRICS
    assert {panel["datasource"]["uid"] for panel, _ in TARGETS} == {"${datasource}"}


def test_layout():
    places = [panel["gridPos"] for panel in BOARD["panels"]]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (a, b)
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(places)
    assert len({(panel["id"], target["refId"]) for panel, target in TARGETS}) == len(TARGETS)
