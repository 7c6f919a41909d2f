"""The AWS cluster file: validity for Ray and EC2, and security. The tests use no network."""

import copy
import inspect
import json
import re
import socket
import subprocess
from pathlib import Path

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from ray._private.authentication import authentication_token_setup
from ray.autoscaler._private.aws import config as aws
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.modules.job import job_supervisor

from giffy_ray.cluster.local import JOB_STOP_WAIT_ENV
from tests.conftest import ROOT

FILE = ROOT / "cluster" / "ray-cluster.yaml"
README = (ROOT / "cluster" / "README.md").read_text()
DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text()


class AWSRequestError(Exception):
    """Ray would have sent a request to AWS."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def fail(*args, **_):
        raise AssertionError(f"a test of the cluster file used the network: {args[1:]}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)


@pytest.fixture
def config():
    return yaml.safe_load(FILE.read_text())


@pytest.fixture
def launch(monkeypatch):
    """Processes a file as `ray up` does before it starts an instance; any request to AWS raises AWSRequestError."""

    def fail(name, _):
        raise AWSRequestError(name)

    monkeypatch.setattr(aws, "_resource", fail)
    for step in ("_configure_key_pair", "_configure_subnet"):  # they always send requests
        monkeypatch.setattr(aws, step, lambda config: config)
    # The launcher reports its key to listeners; there is none here.
    monkeypatch.setattr(aws.global_event_system, "execute_callback", lambda *_: None)

    def launch(config):
        config = prepare_config(copy.deepcopy(config))
        config["auth"]["ssh_private_key"] = "key.pem"
        return aws.bootstrap_aws(config)

    return launch


def node_types(config):
    return config["available_node_types"]


def workers(config):
    return [node for name, node in node_types(config).items() if name != config["head_node_type"]]


def pinned_ray():
    (version,) = re.findall(r"^ray(?:\[[^]]*\])?==([\d.]+)", (ROOT / "requirements.lock").read_text(), re.M)
    return version


def ec2_errors(node_config):
    """Validates an instance's parameters against EC2's description of RunInstances. Returns the errors, or ''."""
    shape = botocore.session.Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1} | node_config, shape)
    return report.generate_report()


def test_the_root_has_a_link_to_the_file():
    link = ROOT / "ray-cluster.yaml"
    assert link.is_symlink()
    assert link.readlink() == Path("cluster/ray-cluster.yaml")
    assert link.resolve() == FILE.resolve()


def test_ray_accepts_the_file(config):
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    # Ray's defaults would install a nightly wheel.
    assert "nightly" not in str(prepared)
    assert "ray-wheels" not in str(prepared)


@pytest.mark.parametrize("path", [["idle_timeout_minuts"], ["docker", "runoptions"], ["auth", "user"]])
def test_ray_rejects_a_misspelt_key(config, path):
    *sections, key = path
    section = config
    for name in sections:
        section = section[name]
    section[key] = "5"
    with pytest.raises(jsonschema.ValidationError, match=key):
        validate_config(prepare_config(config))


def test_ray_rejects_a_node_type_without_resources(config):
    del node_types(config)["l4"]["resources"]
    with pytest.raises(jsonschema.ValidationError, match="resources"):
        validate_config(prepare_config(config))


def test_ec2_knows_every_parameter(config):
    for node in node_types(config).values():
        assert ec2_errors(node["node_config"]) == ""
    # Ray's schema does not cover node_config, so only AWS would report a misspelt key.
    assert "HttpToken" in ec2_errors({"MetadataOptions": {"HttpToken": "required"}})


def test_every_node_has_an_image_a_group_and_a_profile(config):
    for node in node_types(config).values():
        instance = node["node_config"]
        assert node["resources"]["CPU"] >= 2
        assert re.fullmatch(r"ami-(REPLACE|[0-9a-f]{8,17})", instance["ImageId"])
        (group,) = instance["SecurityGroupIds"]
        assert re.fullmatch(r"sg-(REPLACE|[0-9a-f]{8,17})", group)
        assert instance["MetadataOptions"]["HttpTokens"] == "required"
        assert instance["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
        assert set(instance["IamInstanceProfile"]) == {"Name"}
        assert instance["IamInstanceProfile"]["Name"] in README


def test_the_head_is_on_demand_and_workers_are_spot_instances(config):
    head = node_types(config)[config["head_node_type"]]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert "GPU" not in head["resources"]
    for node in workers(config):
        assert node["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert node["resources"]["GPU"] >= 1
        assert node["min_workers"] == 0
    assert 5 <= config["idle_timeout_minutes"] <= 10
    assert config["provider"]["cache_stopped_nodes"] is False


def test_ray_creates_no_security_group_and_no_role(config, launch):
    launched = launch(config)
    for name, node in node_types(launched).items():
        for field in ("SecurityGroupIds", "ImageId"):
            assert node["node_config"][field] == node_types(config)[name]["node_config"][field]
    assert launched["head_node"] == {}


@pytest.mark.parametrize(
    ("node", "field", "service"),
    [
        ("head", "SecurityGroupIds", "ec2"),
        ("l4", "SecurityGroupIds", "ec2"),
        ("head", "IamInstanceProfile", "iam"),
    ],
)
def test_ray_would_create_a_missing_group_or_role(config, launch, node, field, service):
    del node_types(config)[node]["node_config"][field]
    node_types(config)[node]["node_config"]["SubnetIds"] = ["subnet-1"]
    with pytest.raises(AWSRequestError, match=service):
        launch(config)


def test_nothing_is_open_to_the_world(config):
    for text in (FILE.read_text(), README, DOCKERFILE):
        assert "0.0.0.0" not in text
        assert "::/0" not in text
    # Rules in the file would be added to Ray's own, which open SSH to the world.
    assert "security_group" not in config["provider"]
    assert "--dashboard-host=127.0.0.1" in start_command(config, "head")


def start_command(config, kind):
    (command,) = [line for line in config[f"{kind}_start_ray_commands"] if "ray start" in line]
    return command


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_ray_starts_with_the_token(config, kind):
    settings, _, arguments = start_command(config, kind).partition("ray start")
    assert "export RAY_AUTH_MODE=token RAY_worker_niceness=0;" in settings
    assert "ulimit -n 65536;" in settings
    assert ("--head" in arguments) == (kind == "head")
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]


def test_jobs_have_time_to_write_their_last_checkpoint(config):
    """The head runs them, and its environment sets how long `ray job stop` waits."""
    settings, _, _ = start_command(config, "head").partition("ray start")
    (name, wait_s), *_ = JOB_STOP_WAIT_ENV.items()
    assert f"export {name}={wait_s};" in settings
    assert f"{name}={wait_s}" in README
    supervisor = inspect.getsource(job_supervisor)
    assert re.search(rf'os\.environ\.get\(\s*"{name}"', supervisor)


def test_the_token_is_where_ray_reads_it(config):
    (path,) = config["file_mounts"]
    assert Path(path).expanduser() == authentication_token_setup._get_default_token_path()
    assert config["file_mounts"][path] == path
    command = docker_start_cmds(
        "ubuntu", "image", config["file_mounts"], "name", [], config["cluster_name"], "/home/ray", "docker"
    )
    assert f"/{path}:/home/ray/.ray/auth_token " in command
    assert "RAY_AUTH_TOKEN" not in FILE.read_text()  # a command would be logged


def test_nodes_wait_for_docker_and_the_driver(config):
    common, registry = config["initialization_commands"], config["docker"]["image"].split("/")[0]
    assert any("docker info" in command for command in common)
    assert any("docker login" in command and registry in command for command in common)
    for node in workers(config):  # a node type's list replaces the common one
        assert set(common) < set(node["initialization_commands"])
        assert any("nvidia-smi" in command for command in node["initialization_commands"])
    assert "--gpus all" in config["docker"]["worker_run_options"]


def test_commands_are_valid_shell(config):
    prepared = prepare_config(config)
    commands = [line for name in prepared if name.endswith("_commands") for line in prepared[name]]
    for command in commands + [line for node in workers(config) for line in node["initialization_commands"]]:
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0, command


def test_all_files_name_one_version_of_ray(config):
    ray = pinned_ray()
    assert config["docker"]["image"].endswith(f":{ray}")
    assert any(f"'{ray}'" in command for command in config["setup_commands"])
    assert f"\nFROM rayproject/ray:{ray}-py311-gpu\n" in DOCKERFILE
    assert f"'{ray}'" in DOCKERFILE
    assert f"giffy-ray:{ray}" in README


def test_the_readme_explains_what_to_replace():
    for mark in set(re.findall(r"[\w-]*REPLACE[\w-]*", FILE.read_text().partition("\ncluster_name")[2])):
        assert f"`{mark}`" in README
    assert "aws ssm get-parameter" in README
    assert "/aws/service/deeplearning/ami/x86_64/" in README
    assert "never run" in README
    assert "real cloud" in README


def test_roles_are_narrow():
    policies = [json.loads(text) for text in re.findall(r"\.json <<EOF\n(.*?)\nEOF", README, re.S)]
    assert len(policies) == 3
    statements = [statement for policy in policies for statement in policy["Statement"]]
    assert "ec2:RunInstances" in str(statements)
    for statement in statements:
        assert "*" not in str(statement["Action"])
        assert statement.get("Resource") != "*" or "aws:RequestedRegion" in str(statement["Condition"])
