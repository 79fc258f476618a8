"""The paths: an exact list, on the raw octets, and nothing beside it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import errors
from proxy.core.routes import OFFLINE_ROOTS, ROUTES, PromptKind, find_route, model_of_path

_ENGINE_CONTROL = (
    b"/flush_cache", b"/release_memory_occupation", b"/sleep", b"/wake_up", b"/load_lora_adapter",
    b"/v1/load_lora_adapter", b"/update_weights_from_disk", b"/start_profile", b"/metrics",
    b"/server_info", b"/generate", b"/abort_request", b"/reset_prefix_cache", b"/collective_rpc",
)  # fmt: skip


@pytest.mark.parametrize("path", sorted(ROUTES))
def test_each_path_has_its_methods_and_no_other(path: bytes) -> None:
    route = ROUTES[path]
    for method in (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH"):
        if method in route.methods:
            assert find_route(method, path) is route
        elif (method, path) == (b"GET", b"/v1/chat/completions"):
            assert find_route(method, path).lookup  # the list of those that are stored
        else:
            with pytest.raises(errors.MethodNotAllowedError, match="use "):
                find_route(method, path)


def _disguises(path: bytes) -> list[bytes]:
    return [
        path + b"/", b"/" + path, path.replace(b"/", b"//"), b"/." + path, b"/x/.." + path,
        path + b";x", path + b"%00", path + b"%20", b"/%2e" + path, path.upper(),
        path.replace(b"/", b"%2f", 1), path[:1] + b"%%%02x" % path[1] + path[2:], path + b"\\",
        path[1:], b"/v1/.." + path, b"/v1/models/.." + path, b"/v1/models/x/../.." + path,
    ]  # fmt: skip


@pytest.mark.parametrize("path", [*sorted(ROUTES), *_ENGINE_CONTROL])
def test_no_disguise_of_a_path_is_that_path(path: bytes) -> None:
    for disguise in _disguises(path):
        with pytest.raises((errors.NotFoundError, errors.MethodNotAllowedError)):
            find_route(b"POST", disguise)


@pytest.mark.parametrize("path", _ENGINE_CONTROL)
@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_an_engines_control_surface_is_not_here(path: bytes, method: bytes) -> None:
    with pytest.raises(errors.NotFoundError):
        find_route(method, path)


@pytest.mark.parametrize(
    ("method", "path"),
    [(b"GET", b"/v1/responses/resp_1-A"), (b"POST", b"/v1/responses/resp_1-A/cancel")],
)
def test_stored_responses_are_looked_up(method: bytes, path: bytes) -> None:
    route = find_route(method, path)
    assert (route.name, route.lookup, route.json, route.local) == ("responses", True, False, False)
    with pytest.raises(errors.MethodNotAllowedError):
        find_route(b"GET" if method == b"POST" else b"POST", path)


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        (b"/v1/chat/completions/chatcmpl-9d64d8277e38be1e", (b"GET", b"POST", b"DELETE")),
        (b"/v1/chat/completions/completion_id", (b"GET", b"POST", b"DELETE")),
        (b"/v1/chat/completions/chatcmpl-A_b-9/messages", (b"GET",)),
    ],
)
def test_stored_completions_are_looked_up(path: bytes, methods: tuple[bytes, ...]) -> None:
    for method in (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"PATCH"):
        if method in methods:
            route = find_route(method, path)
            assert (route.name, route.lookup, route.json) == ("stored_chat", True, False)
        else:
            with pytest.raises(errors.MethodNotAllowedError):
                find_route(method, path)


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        (b"ft:gpt-4o-mini:acemeco:suffix:abc123", True),
        (b"ft%3Agpt-4o-mini%3aacemeco::abc123", True),
        (b"gpt-4o", False),
        (b"ft", False),
        (b"ft-x", False),
        (b"aft:x", False),
        (b"FT:x", False),
        (b"org/ft:x", False),
        (b"ft:x/y", False),
        (b"ft:x%2Fy", False),
        (b"ft:..", True),  # a name, and no way up: nothing but one segment passes
        (b"ft:" + b"a" * 65, False),
        (b"ft:a:b:c:d:e:f:g", False),
    ],
)
def test_of_models_only_fine_tuned_ones_can_be_deleted(name: bytes, passes: bool) -> None:
    path = b"/v1/models/" + name
    if passes:
        route = find_route(b"DELETE", path)
        assert (route.name, route.lookup, route.local) == ("models", True, False)
        assert find_route(b"GET", path).local
    else:
        with pytest.raises((errors.MethodNotAllowedError, errors.NotFoundError)):
            find_route(b"DELETE", path)
    for method in (b"POST", b"PUT", b"PATCH"):
        with pytest.raises((errors.MethodNotAllowedError, errors.NotFoundError)):
            find_route(method, path)


@pytest.mark.parametrize("method", [b"GET", b"POST", b"DELETE"])
@pytest.mark.parametrize(
    "name",
    [
        b"render", b"derender", b"abort", b"", b"chatcmpl", b"chatcmpl-", b"chatcmpl-a/render",
        b"chatcmpl-a/messages/", b"chatcmpl-a/messages/m", b"chatcmpl-%61", b"chatcmpl-..",
        b"render/chatcmpl-a", b"Chatcmpl-a", b"chatcmpl-a;x", b"completionid", b"../chatcmpl-a",
        b"chatcmpl-" + b"a" * 129, b"render-x", b"chatcmpl-a/../render",
    ],
)  # fmt: skip
def test_no_call_of_an_engine_passes_for_a_stored_completion(method: bytes, name: bytes) -> None:
    with pytest.raises(errors.NotFoundError):
        find_route(method, b"/v1/chat/completions/" + name)


@pytest.mark.parametrize(
    "path",
    [
        b"/v1/responses/", b"/v1/responses/a/b", b"/v1/responses/a%2fb", b"/v1/responses/..",
        b"/v1/responses/" + b"a" * 129, b"/v1/responses/a/cancel/", b"/v1/models/",
        b"/v1/models//a", b"/v1/models/../x", b"/v1/models/a/../x", b"/v1/models/a//b",
        b"/v1/models/" + b"a" * 257, b"/v1/models/-a", b"/v1/models/a\x80",
    ],
)  # fmt: skip
def test_odd_names_are_not_found(path: bytes) -> None:
    with pytest.raises(errors.NotFoundError):
        find_route(b"GET", path)
    assert model_of_path(path) == b"" or b".." in path or b"//" in path


@pytest.mark.parametrize(
    ("path", "model"),
    [
        (b"/v1/models", b""),
        (b"/v1/models/m", b"m"),
        (b"/v1/models/org/model-1.5:x", b"org/model-1.5:x"),
        (b"/v1/models/org%2Fmodel", b"org/model"),
        (b"/v1/models/org%2fmodel", b"org/model"),
    ],
)
def test_a_model_is_named_by_its_path(path: bytes, model: bytes) -> None:
    assert model_of_path(path) == model
    route = find_route(b"GET", path)
    assert (route.name, route.local) == ("models", True)


@given(st.sampled_from([b"GET", b"POST", b"PUT"]), st.binary(max_size=40).map(b"/".__add__))
def test_any_path_is_found_or_refused(method: bytes, path: bytes) -> None:
    said = ""
    try:
        route = find_route(method, path)
    except (errors.NotFoundError, errors.MethodNotAllowedError) as error:
        said = error.message
    else:
        assert method in route.methods
    assert said.isascii()


def test_a_long_path_is_not_repeated_in_full() -> None:
    with pytest.raises(errors.NotFoundError) as caught:
        find_route(b"GET", b"/" + b"\xff" * 5000)
    assert len(caught.value.message) < 1000


def test_prompts_are_where_the_apis_have_them() -> None:
    kinds = {path: route.prompt for path, route in ROUTES.items()}
    assert kinds[b"/v1/chat/completions"] is PromptKind.CHAT
    assert kinds[b"/v1/completions"] is PromptKind.COMPLETION
    assert kinds[b"/v1/responses"] is PromptKind.RESPONSES
    assert kinds[b"/v1/messages"] is PromptKind.ANTHROPIC
    for path, route in ROUTES.items():
        posts = route.methods == {b"POST"}
        assert posts is not (route.local or path.startswith(OFFLINE_ROOTS))
        assert (route.prompt is PromptKind.OPAQUE) is (route.local or not route.json), path
