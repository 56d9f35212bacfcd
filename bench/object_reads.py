"""What one S3 read of a worker costs, by three ways to make it: ``python -m bench.object_reads``.

A moto server in a process of its own serves 100 KB objects; this process reads them with 16
threads, each way in turn, in interleaved rounds. What counts is the processor time that a read
costs *here*, since that is what a worker's threads share; reads per second mostly show how fast
moto is.

It is not a benchmark of a store or a network.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import urllib3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials

from tests.servers import S3Endpoint

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BUCKET = "bench"
Read = Callable[[str], int]


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory() as folder, S3Endpoint(Path(folder)) as server:
        client = _client(server, args.threads)
        keys = _fill(client, args.objects, args.size)
        ways = {
            "boto3 get_object": _by_boto3(client),
            "presigned URL + urllib3": _by_signed_url(client, args.threads),
            "signed headers + urllib3": _by_signed_headers(server, args.threads),
        }
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        rate: dict[str, list[float]] = {name: [] for name in ways}
        with ThreadPoolExecutor(args.threads) as threads:
            for read in ways.values():  # connections, imports and caches: not measured
                _measure(threads, read, keys[: args.threads], args.size)
            for _ in range(args.rounds):
                for name, read in ways.items():
                    seconds, processor = _measure(threads, read, keys, args.size)
                    cpu[name].append(1000 * processor / len(keys))
                    rate[name].append(len(keys) / seconds)
    _report(args, cpu, rate)


def _measure(
    threads: ThreadPoolExecutor, read: Read, keys: list[str], size: int
) -> tuple[float, float]:
    """Read `keys` once; seconds on the clock and of the processor."""
    start, processor = time.perf_counter(), time.process_time()
    if any(got != size for got in threads.map(read, keys)):
        raise SystemExit("a read came back with another size")
    return time.perf_counter() - start, time.process_time() - processor


def _by_boto3(client: S3Client) -> Read:
    def read(key: str) -> int:
        return len(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())

    return read


def _by_signed_url(client: S3Client, threads: int) -> Read:
    pool = urllib3.PoolManager(maxsize=threads)

    def read(key: str) -> int:
        url = client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": key})
        return len(pool.request("GET", url).data)

    return read


def _by_signed_headers(server: S3Endpoint, threads: int) -> Read:
    pool = urllib3.PoolManager(maxsize=threads)
    credentials = Credentials(server.access_key, server.secret_key)

    def read(key: str) -> int:
        url = f"{server.url}/{BUCKET}/{key}"
        request = AWSRequest("GET", url)
        S3SigV4Auth(credentials, "s3", server.region).add_auth(request)
        headers = {name: str(value) for name, value in request.headers.items()}
        return len(pool.request("GET", url, headers=headers).data)

    return read


def _client(server: S3Endpoint, threads: int) -> S3Client:
    return boto3.client(
        "s3",
        endpoint_url=server.url,
        region_name=server.region,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        config=Config(
            signature_version="s3v4",
            max_pool_connections=threads,
            s3={"addressing_style": "path"},
            response_checksum_validation="when_required",
        ),
    )


def _fill(client: S3Client, objects: int, size: int) -> list[str]:
    client.create_bucket(Bucket=BUCKET)
    keys = [f"pictures/{number:05}.jpg" for number in range(objects)]
    for key in keys:
        client.put_object(Bucket=BUCKET, Key=key, Body=bytes(size))
    return keys


def _report(
    args: argparse.Namespace, cpu: dict[str, list[float]], rate: dict[str, list[float]]
) -> None:
    print(
        f"{args.objects} objects of {args.size} bytes, {args.threads} threads, {args.rounds} "
        f"interleaved rounds; Python {platform.python_version()}, boto3 {boto3.__version__}, "
        f"urllib3 {importlib.metadata.version('urllib3')}\n"
    )
    print("| way | CPU ms a read: median (lowest - highest) | reads/s, median |")
    print("| --- | --- | --- |")
    for name, values in cpu.items():
        print(
            f"| {name} | {statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f}) "
            f"| {statistics.median(rate[name]):.0f} |"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--objects", type=int, default=600)
    parser.add_argument("--size", type=int, default=100_000, help="bytes an object")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


if __name__ == "__main__":
    main()
