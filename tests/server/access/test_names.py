"""A server without keys, and what pages in a browser on its machine may ask of it."""

from __future__ import annotations

import httpx
import pytest

from lora_runtime.errors import ConfigError, PermissionDenied
from loramux.server.access.names import Names
from loramux.server.config import load_config
from tests.server.access.keyring import OPERATOR, write_keys
from tests.server.test_doors import serving

REBOUND = ("evil.example", "evil.example:{port}", "localhost.evil.example", "127.0.0.1.nip.io",
           "127.1", "0x7f000001", "", "[::1", "a b")  # fmt: skip
OWN = ("127.0.0.1:{port}", "127.0.0.1", "localhost", "LocalHost:{port}", "app.localhost", "[::1]:1",
       "10.0.0.7:8080", "localhost.")  # fmt: skip
ELSEWHERE = ("https://evil.example", "http://127.0.0.1:3000", "http://localhost", "null", "",
             "http://[", "file://", "http://evil.example:{port}")  # fmt: skip


async def asked(served, method="GET", path="/v1/models", **headers) -> httpx.Response:
    given = {name: value.format(port=served.ports.http) for name, value in headers.items()}
    url = f"http://127.0.0.1:{served.ports.http}{path}"
    async with httpx.AsyncClient() as client:
        return await client.request(method, url, headers=given)


async def test_a_page_of_another_site_reaches_nothing_of_a_server_without_keys(tmp_path):
    async with serving(tmp_path) as served:
        for path in ("/v1/models", "/api/status", "/metrics", "/nothing"):
            for host in REBOUND:
                answer = await asked(served, path=path, host=host)
                assert answer.status_code == 403, (path, host)
                assert answer.json()["error"]["code"] == "permission_denied"
            for origin in ELSEWHERE:
                answer = await asked(served, path=path, origin=origin)
                assert answer.status_code == 403, (path, origin)
        for host in OWN:
            assert (await asked(served, host=host)).status_code == 200, host
        for origin in ("http://127.0.0.1:{port}", "HTTP://127.0.0.1:{port}"):
            assert (await asked(served, origin=origin)).status_code == 200
        for name in ("/healthz", "/"):  # what is open shows nothing
            assert (await asked(served, path=name, host="evil.example")).status_code == 200


async def test_an_operator_may_give_names(tmp_path):
    async with serving(tmp_path, http_names="gpu.example,box") as served:
        for host in ("gpu.example", "GPU.example:443", "box:{port}", "localhost"):
            assert (await asked(served, host=host)).status_code == 200
        # A proxy may call by another name than its clients do.
        assert (await asked(served, origin="https://gpu.example")).status_code == 200
        assert (await asked(served, host="evil.example")).status_code == 403
        assert (await asked(served, origin="https://evil.example")).status_code == 403


async def test_with_keys_every_name_is_taken_for_a_page_has_none_of_them(tmp_path):
    async with serving(tmp_path, keys=str(write_keys(tmp_path))) as served:
        key = {"authorization": f"Bearer {OPERATOR}"}
        assert (await asked(served, host="gpu.example", **key)).status_code == 200
        assert (await asked(served, host="gpu.example")).status_code == 401


async def test_an_insecure_server_has_names_that_it_does_not_know(tmp_path):
    async with serving(tmp_path, insecure=True, http_address="0.0.0.0:0") as served:
        assert (await asked(served, host="gpu.example")).status_code == 200
        same = {"host": "gpu.example", "origin": "http://gpu.example"}
        assert (await asked(served, **same)).status_code == 200
        assert (await asked(served, origin="http://evil.example")).status_code == 403


@pytest.mark.parametrize("host", ["::1", "[fe80::1%25eth0]", "[::ffff:127.0.0.1]:80"])
def test_odd_hosts_are_judged(host):
    names = Names(())
    if host.startswith("[::ffff"):
        names.check([host], [])
    else:
        with pytest.raises(PermissionDenied):
            names.check([host + ".evil.example"], [])


@pytest.mark.parametrize("name", ["gpu.example:80", "http://x", "a/b", "a..b", "*"])
def test_what_is_no_host_name_is_refused(name):
    with pytest.raises(ConfigError, match="http_names"):
        load_config(flags={"http_names": [name]})
