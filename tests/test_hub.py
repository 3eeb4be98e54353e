"""Runs on the hub: a small server on this machine stands for it, so that nothing leaves the machine."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants

from diptych import Classifier, Diptych, DualEncoder
from diptych.encoders import ScratchConfig, scratch_encoder
from diptych.errors import UserError
from diptych.hub import card, push, stage
from diptych.run_folder import read_config, write_config, write_json
from diptych.uml.objective import SharedHead, SharedHeadConfig
from diptych.uml.recipes import uml_probe

SHA = "0" * 39 + "1"


class FakeHub:
    """Keeps the files of repositories, and counts commits."""

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.private: dict[str, bool] = {}
        self.refuses = False

    def answer(self, method: str, path: str, body: bytes, host: str) -> tuple[int, dict[str, str], bytes]:
        path = path.partition("?")[0]
        if self.refuses:
            return 403, {"X-Error-Message": "this token may not write"}, b""
        if path == "/api/repos/create":
            told = json.loads(body)
            name = "/".join(filter(None, (told.get("organization") or "user", told["name"])))
            self.private[name] = bool(told.get("private") or told.get("visibility") == "private")
            self.files.setdefault(name, {})
            return 200, {}, json.dumps({"url": f"{host}/{name}"}).encode()
        if path == "/api/validate-yaml":
            return 200, {}, b'{"errors": [], "warnings": []}'
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [each["path"] for each in json.loads(body)["files"]]
            modes = [{"path": each, "uploadMode": "regular", "shouldIgnore": False} for each in files]
            return 200, {}, json.dumps({"files": modes}).encode()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self.commits.append(found[1])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[found[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            told = {"commitUrl": f"{host}/{found[1]}/commit/{SHA}", "commitOid": SHA, "success": True}
            return 200, {}, json.dumps(told).encode()
        repo = next((name for name in self.files if f"/{name}/" in f"{path}/"), None)
        if repo is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        files = self.files[repo]
        if "/revision/" in path or path == f"/api/models/{repo}":
            return 200, {}, json.dumps({"id": repo, "sha": SHA, "siblings": [{"rfilename": f} for f in files]}).encode()
        if "/tree/" in path:
            return (
                200,
                {},
                json.dumps(
                    [{"type": "file", "path": f, "size": len(data), "oid": SHA} for f, data in files.items()]
                ).encode(),
            )
        data = files.get(path.partition("/resolve/")[2].partition("/")[2])
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"ETag": f'"{hash(data):x}"', "X-Repo-Commit": SHA}, data


@pytest.fixture
def hub(monkeypatch, tmp_path):
    fake = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def reply(self):
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    sent += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            status, headers, data = fake.answer(self.command, self.path, sent, f"http://{self.headers['Host']}")
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_HEAD = reply

        def log_message(self, *told):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # with the address of another test
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield fake
    server.shutdown()
    server.server_close()


def with_records(run: Path, kind: str) -> Path:
    """A run folder with the records that training and `diptych evaluate` leave, on data in a private place."""
    config = read_config(run)
    data = {"pairs": "/home/me/secret place/photos.tar?split=train", "valid": "s3://secret/dev.tar"}
    data |= {"images": "hub:owner/photos"} if kind != "dual" else {}
    config["run"]["data"] |= data
    config |= {"data": "600 pairs (3,000 captions), 3,400 unpaired images"}
    write_json(run / "config.json", config)
    name = {"itit": "cider", "dual": "retrieval/mean_r1", "classifier": "accuracy"}[kind]
    control = {"name": "pairs only", "scores": {name: 0.125}, "kind": "without unpaired data"}
    base = {"name": "nearest by /home/me/secret/encoder", "scores": {name: 0.25}, "kind": "baseline"}
    told = {"source": "/home/me/secret/dev.tar", "scores": {name: 0.5}, "baselines": [base, control]}
    write_json(run / "baselines.json", told | {"verdict": f"No baseline does better: {name}.", "notes": []})
    scores = {name: 0.75, "images": 10, "per_class": {}, "source": "/home/me/secret/test.tar", "verdict": ""}
    write_json(run / "evaluation/metrics.json", scores | {"baselines": {"chance": {name: 0.1}}})
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "seconds": 12.0}\n')
    (run / "checkpoints/step-00000001").mkdir(parents=True)
    (run / "checkpoints/step-00000001/state.json").write_text("/home/me/secret")
    return run


@pytest.fixture
def itit_run(save_itit_run, tmp_path):
    return with_records(save_itit_run(tmp_path / "itit", steps=2), "itit")


@pytest.fixture
def classifier_run(tmp_path):
    encoder = scratch_encoder(ScratchConfig(), seed=0)
    head = SharedHead(SharedHeadConfig(widths={"image": encoder.width, "text": 8}, anchor="text", classes=2))
    head.save_pretrained(tmp_path / "uml/head")
    encoder.save_pretrained(tmp_path / "uml/encoder")
    write_json(tmp_path / "uml/classes.json", ["a/b", "c"])
    recipe = uml_probe()
    recipe.data.images, recipe.encoder, recipe.text_encoder = "x", "/home/me/secret/encoder", "google/t5-v1_1-base"
    write_config(tmp_path / "uml", recipe="uml-probe", run=recipe)
    return with_records(tmp_path / "uml", "classifier")


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


def test_a_captioner_comes_back_from_the_hub(hub, itit_run, photo):
    before = Diptych.from_pretrained(itit_run, device="cpu")
    address = before.push_to_hub("user/captioner", license="apache-2.0")
    assert address.endswith("/user/captioner")
    assert hub.commits == ["user/captioner"]
    after = Diptych.from_pretrained("user/captioner", device="cpu")
    assert after.caption(photo) == before.caption(photo)
    torch.testing.assert_close(after.imagine_tokens("a red circle"), before.imagine_tokens("a red circle"))
    assert after.image_generation == before.image_generation


def test_a_dual_encoder_comes_back_and_loads_in_transformers(hub, dual_run, photo):
    from transformers import AutoProcessor, CLIPModel

    before = DualEncoder.from_pretrained(with_records(dual_run, "dual"))
    before.push_to_hub("user/search", private=True)
    assert hub.private == {"user/search": True}
    after = DualEncoder.from_pretrained("user/search")
    assert torch.equal(after.embed_images(photo), before.embed_images(photo))
    assert torch.equal(after.embed_texts("a red circle"), before.embed_texts("a red circle"))
    assert CLIPModel.from_pretrained("user/search").config.projection_dim == before.width
    assert AutoProcessor.from_pretrained("user/search")(text="a red circle")["input_ids"]
    with pytest.raises(UserError, match="loaded from a run folder"):
        after.push_to_hub("user/again")


def test_a_classifier_comes_back(hub, classifier_run, photo):
    before = Classifier.from_pretrained(classifier_run, device="cpu")
    before.push_to_hub("user/classes")
    after = Classifier.from_pretrained("user/classes", device="cpu")
    assert after.classes == ("a/b", "c")
    assert after.predictions(photo) == before.predictions(photo)


def test_nothing_private_is_uploaded(hub, itit_run, classifier_run, dual_run, tmp_path):
    settings = json.loads((dual_run / "model/config.json").read_text())
    settings["text_config"]["_name_or_path"] = "/home/me/secret/tower"
    write_json(dual_run / "model/config.json", settings)
    for run in (itit_run, classifier_run, with_records(dual_run, "dual")):
        push(run, f"user/{run.name}")
    for name, files in hub.files.items():
        assert not any("checkpoints" in file or "metrics" in file for file in files)
        for file, data in files.items():
            for word in (b"secret", b"/home/me", str(tmp_path).encode()):
                assert word not in data, (name, file)
    config = json.loads(hub.files["user/uml"]["config.json"])["run"]
    assert config["encoder"] == "encoder"
    assert config["text_encoder"] == "google/t5-v1_1-base"
    assert config["data"]["images"] == "hub:owner/photos"
    assert b"</s>" in hub.files["user/itit"]["text_encoder/tokenizer_config.json"]  # a slash that is no path


@pytest.mark.parametrize("kind", ["itit", "dual", "classifier"])
def test_the_card(kind, itit_run, dual_run, classifier_run):
    run = {"itit": itit_run, "dual": dual_run, "classifier": classifier_run}[kind]
    told = card(with_records(run, kind) if kind == "dual" else run, repo_id="user/mine")
    _, head, body = told.split("---\n", 2)
    data = yaml.safe_load(head)
    assert "license" not in data
    assert data["library_name"] == ("transformers" if kind == "dual" else "diptych")
    assert (
        data["datasets"] == ["photos.tar", "dev.tar"] if kind == "dual" else ["photos.tar", "owner/photos", "dev.tar"]
    )
    results = data["model-index"][0]["results"]
    values = {each["dataset"]["name"]: each["metrics"][0]["value"] for each in results}
    assert values == {"test.tar": 0.75, "dev.tar (validation)": 0.5}
    assert "600 pairs (3,000 captions), 3,400 unpaired images" in body
    assert "control, without unpaired data: pairs only" in body
    assert "nearest by encoder" in body
    assert "No baseline does better" in body
    assert "12 s" in body
    assert "seed: 0" in body
    assert yaml.safe_load(card(run, license="mit").split("---\n")[1])["license"] == "mit"


def test_a_card_without_scores_says_so(save_itit_run, tmp_path):
    told = card(save_itit_run(tmp_path / "bare", steps=2))
    assert "Nothing was scored" in told
    assert "model-index" not in told


def test_what_cannot_be_pushed(hub, itit_run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no run folder"):
        push(tmp_path / "none", "user/x")
    with pytest.raises(UserError, match="no name of a repository"):
        push(itit_run, "user/x/y")
    hub.refuses = True
    with pytest.raises(UserError, match="the hub did not take it") as error:
        push(itit_run, "user/x")
    assert "\n" not in str(error.value)
    hub.refuses = False
    (itit_run / "model").rename(itit_run / "gone")
    with pytest.raises(UserError, match="finish it"):
        push(itit_run, "user/x")
    assert hub.commits == []
    with pytest.raises(UserError, match="not on the hub"):
        Diptych.from_pretrained("user/nothing")


def test_without_a_token(itit_run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match=r"not logged in.*hf auth login"):
        push(itit_run, "user/x")


def test_weights_are_linked_not_copied(itit_run, tmp_path):
    stage(itit_run, tmp_path / "staged")
    assert (tmp_path / "staged/model/model.safetensors").is_symlink()
