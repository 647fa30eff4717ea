from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AdapterState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_STATE_UNSPECIFIED: _ClassVar[AdapterState]
    ADAPTER_STATE_REGISTERED: _ClassVar[AdapterState]
    ADAPTER_STATE_DOWNLOADING: _ClassVar[AdapterState]
    ADAPTER_STATE_VERIFYING: _ClassVar[AdapterState]
    ADAPTER_STATE_LOADED: _ClassVar[AdapterState]
    ADAPTER_STATE_DRAINING: _ClassVar[AdapterState]
    ADAPTER_STATE_FAILED: _ClassVar[AdapterState]
ADAPTER_STATE_UNSPECIFIED: AdapterState
ADAPTER_STATE_REGISTERED: AdapterState
ADAPTER_STATE_DOWNLOADING: AdapterState
ADAPTER_STATE_VERIFYING: AdapterState
ADAPTER_STATE_LOADED: AdapterState
ADAPTER_STATE_DRAINING: AdapterState
ADAPTER_STATE_FAILED: AdapterState

class AdapterInfo(_message.Message):
    __slots__ = ("name", "digest", "state", "variant", "ranks", "target_modules", "num_parameters", "num_bytes", "honoured", "inert", "source", "loaded_at_s", "num_in_flight", "error", "notes", "invocation_tokens", "has_chat_template", "num_layers", "former_digest", "is_pinned", "is_resident", "num_downloaded_bytes", "num_bytes_to_download")
    class HonouredEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class InertEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    HONOURED_FIELD_NUMBER: _ClassVar[int]
    INERT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    LOADED_AT_S_FIELD_NUMBER: _ClassVar[int]
    NUM_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    INVOCATION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    FORMER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    IS_PINNED_FIELD_NUMBER: _ClassVar[int]
    IS_RESIDENT_FIELD_NUMBER: _ClassVar[int]
    NUM_DOWNLOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_TO_DOWNLOAD_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    state: AdapterState
    variant: str
    ranks: _containers.RepeatedScalarFieldContainer[int]
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    num_parameters: int
    num_bytes: int
    honoured: _containers.ScalarMap[str, str]
    inert: _containers.ScalarMap[str, str]
    source: str
    loaded_at_s: float
    num_in_flight: int
    error: str
    notes: _containers.RepeatedScalarFieldContainer[str]
    invocation_tokens: _containers.RepeatedScalarFieldContainer[int]
    has_chat_template: bool
    num_layers: int
    former_digest: str
    is_pinned: bool
    is_resident: bool
    num_downloaded_bytes: int
    num_bytes_to_download: int
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., state: _Optional[_Union[AdapterState, str]] = ..., variant: _Optional[str] = ..., ranks: _Optional[_Iterable[int]] = ..., target_modules: _Optional[_Iterable[str]] = ..., num_parameters: _Optional[int] = ..., num_bytes: _Optional[int] = ..., honoured: _Optional[_Mapping[str, str]] = ..., inert: _Optional[_Mapping[str, str]] = ..., source: _Optional[str] = ..., loaded_at_s: _Optional[float] = ..., num_in_flight: _Optional[int] = ..., error: _Optional[str] = ..., notes: _Optional[_Iterable[str]] = ..., invocation_tokens: _Optional[_Iterable[int]] = ..., has_chat_template: _Optional[bool] = ..., num_layers: _Optional[int] = ..., former_digest: _Optional[str] = ..., is_pinned: _Optional[bool] = ..., is_resident: _Optional[bool] = ..., num_downloaded_bytes: _Optional[int] = ..., num_bytes_to_download: _Optional[int] = ...) -> None: ...

class LoadAdapterRequest(_message.Message):
    __slots__ = ("name", "source", "replace", "pin")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    replace: bool
    pin: bool
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ..., replace: _Optional[bool] = ..., pin: _Optional[bool] = ...) -> None: ...

class LoadAdapterResponse(_message.Message):
    __slots__ = ("adapter", "already_loaded")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    ALREADY_LOADED_FIELD_NUMBER: _ClassVar[int]
    adapter: AdapterInfo
    already_loaded: bool
    def __init__(self, adapter: _Optional[_Union[AdapterInfo, _Mapping]] = ..., already_loaded: _Optional[bool] = ...) -> None: ...

class UploadAdapterRequest(_message.Message):
    __slots__ = ("start", "chunk")
    START_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    start: UploadStart
    chunk: UploadChunk
    def __init__(self, start: _Optional[_Union[UploadStart, _Mapping]] = ..., chunk: _Optional[_Union[UploadChunk, _Mapping]] = ...) -> None: ...

class UploadStart(_message.Message):
    __slots__ = ("name", "replace", "files")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    name: str
    replace: bool
    files: _containers.RepeatedCompositeFieldContainer[UploadFile]
    def __init__(self, name: _Optional[str] = ..., replace: _Optional[bool] = ..., files: _Optional[_Iterable[_Union[UploadFile, _Mapping]]] = ...) -> None: ...

class UploadFile(_message.Message):
    __slots__ = ("name", "num_bytes", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_bytes: int
    sha256: str
    def __init__(self, name: _Optional[str] = ..., num_bytes: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class UploadChunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class UploadAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: AdapterInfo
    def __init__(self, adapter: _Optional[_Union[AdapterInfo, _Mapping]] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("name", "cancel", "wait")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    name: str
    cancel: bool
    wait: bool
    def __init__(self, name: _Optional[str] = ..., cancel: _Optional[bool] = ..., wait: _Optional[bool] = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: AdapterInfo
    def __init__(self, adapter: _Optional[_Union[AdapterInfo, _Mapping]] = ...) -> None: ...

class RollbackAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class RollbackAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: AdapterInfo
    def __init__(self, adapter: _Optional[_Union[AdapterInfo, _Mapping]] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters", "is_abridged")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    IS_ABRIDGED_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterInfo]
    is_abridged: bool
    def __init__(self, adapters: _Optional[_Iterable[_Union[AdapterInfo, _Mapping]]] = ..., is_abridged: _Optional[bool] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: AdapterInfo
    def __init__(self, adapter: _Optional[_Union[AdapterInfo, _Mapping]] = ...) -> None: ...

class StoredAdapter(_message.Message):
    __slots__ = ("source", "num_bytes", "stored_at_s", "adapters")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_AT_S_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    source: str
    num_bytes: int
    stored_at_s: float
    adapters: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, source: _Optional[str] = ..., num_bytes: _Optional[int] = ..., stored_at_s: _Optional[float] = ..., adapters: _Optional[_Iterable[str]] = ...) -> None: ...

class ListStoredAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListStoredAdaptersResponse(_message.Message):
    __slots__ = ("stored", "num_bytes", "max_bytes")
    STORED_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    stored: _containers.RepeatedCompositeFieldContainer[StoredAdapter]
    num_bytes: int
    max_bytes: int
    def __init__(self, stored: _Optional[_Iterable[_Union[StoredAdapter, _Mapping]]] = ..., num_bytes: _Optional[int] = ..., max_bytes: _Optional[int] = ...) -> None: ...

class DeleteStoredAdapterRequest(_message.Message):
    __slots__ = ("source",)
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    source: str
    def __init__(self, source: _Optional[str] = ...) -> None: ...

class DeleteStoredAdapterResponse(_message.Message):
    __slots__ = ("stored",)
    STORED_FIELD_NUMBER: _ClassVar[int]
    stored: StoredAdapter
    def __init__(self, stored: _Optional[_Union[StoredAdapter, _Mapping]] = ...) -> None: ...
