"""What can be said of the container files without a container runtime."""

from pathlib import Path

import yaml

DOCKER = Path(__file__).parents[2] / "docker"


def test_compose_servers_can_write_their_memory_and_read_the_weights():
    text = (DOCKER / "compose.yaml").read_text()
    assert "Not built and not run" in text
    servers = yaml.safe_load(text)["services"]
    assert len(servers) == 2
    for server in servers.values():
        mounts = {volume["source"]: volume for volume in server["volumes"]}
        assert all(volume["target"] != "/dev/shm" and volume["read_only"] for volume in mounts.values())
        assert "shm_size" in server
        # no default, which would be a folder that somebody else uses; the same path on both sides
        (transfer,) = [source for source in mounts if source.startswith("${TRANSFER_DIR")]
        assert transfer.startswith("${TRANSFER_DIR:?")
        assert mounts[transfer]["target"] == "${TRANSFER_DIR}"
        # the folder of the weights is its owner's only
        assert server["user"].startswith("${RUN_AS:?")


def test_readme_sets_what_compose_asks_for():
    readme = (DOCKER / "README.md").read_text()
    command = readme[readme.index("mkdir -p") : readme.index("docker compose -f")]
    assert all(f"{name}=" in command for name in ("MODEL_DIR", "TRANSFER_DIR", "RUN_AS"))
