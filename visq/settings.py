"""All settings of visq, in one class; each is an environment variable with the prefix ``VISQ_``.

``visq config`` prints the effective values with secrets hidden.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from visq.errors import ConfigurationError

MIB = 1024 * 1024

TENANT_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Names of tenants are part of routing keys, queue names and object keys."""


IMAGE_HOST = re.compile(r"(?P<host>[a-z0-9_.-]+|\[[0-9a-f:.]+\])(:(?P<port>[0-9]{1,5}))?")


class Settings(BaseSettings):
    """Settings of every process of visq. Durations are in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(
        env_prefix="VISQ_", extra="ignore", use_attribute_docstrings=True, frozen=True
    )

    # --- the servers -------------------------------------------------------------------------
    data: Path = Path("visq-data")
    """Folder for everything that the embedded default keeps."""
    database_url: SecretStr = SecretStr("")
    """SQLAlchemy URL: ``postgresql+psycopg://...`` or ``sqlite:///file``.
    Empty: SQLite in the data folder."""
    broker_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    """Celery's broker, and where results are published: ``redis://...`` or ``amqp://...``."""
    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    """Redis for result values, token streams and the list of live workers."""
    object_store: str = ""
    """``s3`` (with the settings below), or ``file:///folder`` that answers to ``s3://`` names.
    Empty: a folder in the data folder."""

    # --- S3 ----------------------------------------------------------------------------------
    s3_endpoint_url: str | None = None
    """Endpoint of an S3-compatible store such as MinIO; unset: AWS."""
    s3_region: str | None = None
    s3_access_key_id: SecretStr | None = None
    """Unset: boto3's own chain (environment, profile, instance role)."""
    s3_secret_access_key: SecretStr | None = None
    s3_buckets: str = ""
    """Buckets, or ``bucket/prefix``, that jobs may read, separated by commas; empty: all that the
    credentials can read."""
    upload_bucket: str = "visq-uploads"
    """Bucket for uploads; a tenant reads only its own part of it."""

    # --- the API -----------------------------------------------------------------------------
    host: str = "127.0.0.1"
    """Address that the API listens on. Other than loopback needs ``api_keys``."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8710
    """Port of the API; 0: a free one."""
    api_keys: SecretStr = SecretStr("")
    """``name:secret`` pairs separated by commas. Each name is a tenant."""
    max_body_bytes: Annotated[int, Field(gt=0)] = 32 * MIB
    """Largest JSON body."""
    max_upload_bytes: Annotated[int, Field(gt=0)] = 50 * MIB
    """Largest upload of one image."""
    max_file_bytes: Annotated[int, Field(gt=0)] = 1024 * MIB
    """Largest upload of one file (``/v1/files``)."""

    # --- jobs --------------------------------------------------------------------------------
    lease_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long a claim holds without a heartbeat; a dead worker's jobs go on after this."""
    heartbeat_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Time between two renewals of a worker's leases."""
    maintenance_seconds: Annotated[float, Field(gt=0)] = 1.0
    """Time between two rounds of the maintenance loop."""
    republish_seconds: Annotated[float, Field(gt=0)] = 15.0
    """A job still queued this long after its last publish is published again."""
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """Attempts before a job fails with ``attempts_exhausted``."""
    retry_backoff_seconds: Annotated[float, Field(ge=0)] = 1.0
    """Wait before the second attempt; doubles with each further one."""
    batch_window: Annotated[int, Field(ge=0)] = 0
    """Items of all batches that are in the broker or running at a time; 0: as many as the live
    workers hold, less an eighth that is kept free for other lanes."""
    tenant_weights: str = ""
    """``name=weight`` pairs separated by commas: a tenant of weight 2 gets twice the turns of one
    of weight 1 (the default) when items of both wait."""
    max_batch_items: Annotated[int, Field(ge=1)] = 1_000_000
    """Most lines (or images) of a batch's input; more fail the batch."""
    max_line_bytes: Annotated[int, Field(gt=0)] = 8 * MIB
    """Longest line of a batch's input file."""
    result_ttl_seconds: Annotated[int, Field(gt=0)] = 86_400
    """How long Redis keeps a result and a token stream."""

    # --- the worker --------------------------------------------------------------------------
    model: str = "small"
    """``small`` (the model that ships with visq), a folder, or a name that transformers loads."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto``: bfloat16 on CUDA, float32 on the CPU."""
    concurrency: Annotated[int, Field(ge=0, le=4096)] = 0
    """Jobs, and messages of the broker, that one worker holds at a time; 0: as many as its engine
    can usefully hold and shared memory has room for. More than the engine can hold is cut to it."""
    shutdown_seconds: Annotated[float, Field(ge=0)] = 20.0
    """After SIGTERM, running jobs have this long to finish; then they are handed back."""

    # --- the engine --------------------------------------------------------------------------
    engine: Literal["auto", "native", "generate"] = "auto"
    """``auto``: the native engine (continuous batching) if it knows the model, else transformers'
    ``generate``, one request after the other."""
    engine_threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of the engine; 0: torch's own choice, or one for a model under
    100 M weights, which more threads only slow down."""
    engine_hang_seconds: Annotated[float, Field(gt=0)] = 120.0
    """An engine that makes no step for this long while it has requests is killed and started
    again; their jobs are attempted again. Loading the model does not count."""
    session_len: Annotated[int, Field(ge=1)] | None = None
    """Most tokens of prompt and answer together; unset: what the model and the KV cache allow."""
    max_batch_size: Annotated[int, Field(ge=0, le=2048)] = 0
    """Most answers that are generated at a time; 0: 32 on the CPU, 256 on CUDA."""
    max_step_tokens: Annotated[int, Field(ge=0)] = 0
    """Most tokens that one step computes: longer prompts are computed in pieces, between which
    other answers go on; 0: 512 on the CPU, 8192 on CUDA."""
    kv_cache_bytes: Annotated[int, Field(ge=0)] = 0
    """Memory of the KV cache; 0: 256 MiB on the CPU, on CUDA what ``gpu_memory_utilization``
    leaves."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Part of the GPU's memory that the engine may use: weights, caches and work space."""
    vision_cache_bytes: Annotated[int, Field(ge=0)] = 0
    """Memory for features of pictures, which are encoded once while they stay there; 0: 128 MiB on
    the CPU, 2 GiB on CUDA."""
    host_cache_bytes: Annotated[int, Field(ge=0)] | None = None
    """Memory of the machine for the KV cache of sessions, so that a turn that comes minutes later
    needs not be computed from its start; 0: none. Unset: 4 GiB on CUDA, none on the CPU."""
    preparers: Annotated[int, Field(ge=0)] | None = None
    """Processes that resize and cut pictures for the model; 0: a thread of the engine does. Unset:
    none on the CPU, on CUDA one for every three cores, up to 6."""
    prefix_caching: bool = True
    """Keep the KV cache of prompts, so that what begins like an earlier prompt of the same tenant
    (the next turn of a session) is not computed again."""
    eager_mode: bool = False
    """On CUDA: neither CUDA graphs nor compiled layers. The worker starts in half the time, and is
    several times as slow."""
    adapters: str = ""
    """LoRA adapters that jobs may name in ``adapter_name``: ``name=folder`` pairs separated by
    commas."""

    # --- metrics of the worker ---------------------------------------------------------------
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port on which a worker answers Prometheus (docs/metrics.md); 0: a free one, which its log
    names; unset: none."""
    metrics_host: str = "127.0.0.1"
    """Address of that port. Metrics hold no content of jobs, but are open to whoever connects."""

    # --- images ------------------------------------------------------------------------------
    max_image_bytes: Annotated[int, Field(gt=0)] = 50 * MIB
    max_image_pixels: Annotated[int, Field(gt=0)] = 50_000_000
    fetch_concurrency: Annotated[int, Field(ge=1)] = 16
    """Images that one worker fetches at a time from the object store, and as many from the web."""
    fetch_timeout_seconds: Annotated[float, Field(gt=0)] = 20.0
    """Longest silence of the object store while an image is read."""
    fetch_total_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Longest time that reading (or writing) one image may take in one attempt of a job, all tries
    together. An attempt fails after it with ``image_fetch_failed``, which is tried again."""
    image_urls: Literal["off", "public"] = "public"
    """From where ``https://`` images are read: ``public``: from all of the public internet, and
    the hosts below; ``off``: only from those."""
    image_url_hosts: str = ""
    """Hosts (``host`` or ``host:port``, separated by commas) from which images are read though
    their addresses are not public, and also by ``http://``: a gateway in front of buckets, say.
    Without a port: the two usual ones."""
    decode_processes: Annotated[int, Field(ge=1)] = 1
    """Media processes of one worker."""
    decode_timeout_seconds: Annotated[float, Field(gt=0)] = 20.0
    media_cache: Path | None = None
    """Folder of the worker's image cache; unset: in the data folder."""
    media_cache_bytes: Annotated[int, Field(ge=0)] = 1024 * MIB
    pixel_cache_bytes: Annotated[int, Field(ge=0)] = 128 * MIB
    """Shared memory for decoded images that no job shows any more, in case that others do; 0: none.
    Never more than an eighth of ``/dev/shm`` is taken."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @field_validator("api_keys")
    @classmethod
    def _keys_are_pairs(cls, value: SecretStr) -> SecretStr:
        parse_api_keys(value.get_secret_value())
        return value

    @field_validator("adapters")
    @classmethod
    def _adapters_are_pairs(cls, value: str) -> str:
        parse_adapters(value)
        return value

    @field_validator("image_url_hosts")
    @classmethod
    def _hosts_have_ports(cls, value: str) -> str:
        parse_image_hosts(value)
        return value

    @field_validator("tenant_weights")
    @classmethod
    def _weights_are_pairs(cls, value: str) -> str:
        parse_weights(value)
        return value

    @cached_property
    def weights(self) -> dict[str, float]:
        """Tenant name -> weight."""
        return parse_weights(self.tenant_weights)

    @cached_property
    def tenants(self) -> dict[str, str]:
        """Tenant name -> secret."""
        return parse_api_keys(self.api_keys.get_secret_value())

    @cached_property
    def adapter_folders(self) -> dict[str, str]:
        """Adapter name -> folder."""
        return parse_adapters(self.adapters)

    @cached_property
    def image_hosts(self) -> frozenset[tuple[str, int]]:
        """(host, port) of ``image_url_hosts``."""
        return parse_image_hosts(self.image_url_hosts)

    @property
    def database(self) -> str:
        """The database URL in effect."""
        return self.database_url.get_secret_value() or f"sqlite:///{self.data.resolve()}/visq.db"

    @property
    def broker(self) -> str:
        return self.broker_url.get_secret_value()

    @property
    def redis(self) -> str:
        return self.redis_url.get_secret_value()

    @property
    def objects(self) -> str:
        """``s3`` or the URL of the folder store."""
        return self.object_store or (self.data.resolve() / "objects").as_uri()


def parse_api_keys(text: str) -> dict[str, str]:
    """Parse ``name:secret,name:secret`` into a dict.

    :raises ConfigurationError: if a pair has no name or no secret, or a name comes twice or holds
        other characters than letters, digits, ``-`` and ``_`` (names are part of queue names).
    """
    keys: dict[str, str] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, _, secret = pair.partition(":")
        if not secret or not TENANT_NAME.fullmatch(name) or name in keys:
            raise ConfigurationError(
                "VISQ_API_KEYS must be `name:secret` pairs separated by commas, with distinct "
                "names of up to 64 letters, digits, `-` and `_`"
            )
        keys[name] = secret
    return keys


def parse_weights(text: str) -> dict[str, float]:
    """Parse ``name=weight,name=weight`` into a dict.

    :raises ConfigurationError: if a weight is no positive number, or a name comes twice.
    """
    weights: dict[str, float] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (part.strip() for part in pair.partition("="))
        weight = float(number) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", number) else 0.0
        if not TENANT_NAME.fullmatch(name) or weight <= 0 or name in weights:
            raise ConfigurationError(
                "VISQ_TENANT_WEIGHTS must be `name=weight` pairs separated by commas, with "
                "distinct names and positive weights"
            )
        weights[name] = weight
    return weights


def parse_adapters(text: str) -> dict[str, str]:
    """Parse ``name=folder,name=folder`` into a dict.

    :raises ConfigurationError: if a pair has no name or no folder, or a name comes twice.
    """
    folders: dict[str, str] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, _, folder = (part.strip() for part in pair.partition("="))
        if not name or not folder or name in folders:
            raise ConfigurationError(
                "VISQ_ADAPTERS must be `name=folder` pairs separated by commas, with distinct names"
            )
        folders[name] = folder
    return folders


def parse_image_hosts(text: str) -> frozenset[tuple[str, int]]:
    """Parse ``host,host:port`` into pairs; a host without a port has 80 and 443.

    :raises ConfigurationError: if one is neither; an IPv6 address stands in brackets.
    """
    found: set[tuple[str, int]] = set()
    for entry in filter(None, (part.strip().lower() for part in text.split(","))):
        match = IMAGE_HOST.fullmatch(entry)
        if match is None or not 0 < int(match["port"] or 80) < 65536:
            raise ConfigurationError(
                "VISQ_IMAGE_URL_HOSTS must be `host` or `host:port` separated by commas, without "
                "`https://` and paths"
            )
        ports = [int(match["port"])] if match["port"] else [80, 443]
        found |= {(match["host"].strip("[]"), port) for port in ports}
    return frozenset(found)
