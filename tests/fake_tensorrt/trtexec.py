"""A test double of trtexec: it knows the flags of one version, copies files, and makes its numbers up.

FAKE_TRTEXEC_VERSION is one of trtexec.json's; there are three made-up queries and two layers. FAKE_TRTEXEC_FAIL holds
words: `build`, `crash` (no last line), `killed`, `hang`, `error` (but PASSED). Each call becomes a line of FAKE_TENSORRT_RECORD. The
lines that it prints have the form of NVIDIA's, shortened.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

FACTS = json.loads((Path(__file__).parents[1] / "facts" / "trtexec.json").read_text("utf-8"))
VERSION = os.environ.get("FAKE_TRTEXEC_VERSION", "10.3")
FAILS = os.environ.get("FAKE_TRTEXEC_FAIL", "").split()
LACKS = {"8.5": "--skipInference --builderOptimizationLevel --maxAuxStreams --versionCompatible --excludeLeanRuntime"}
"""8.5 is 8.6.1 without some flags; its logs say `Build only`. Not NVIDIA's own list: that version's source was not read."""
BANNERS = {"8.5": "v8502", "8.6.1": "v8601", "10.3": "v100300", "10.13": "v101303] [b35", "11.1": "v110100] [b12"}
MAGIC = b"NO ENGINE, A TEST DOUBLE OF TRTEXEC\n"
LATENCIES = (0.873472, 0.8448, 2.31027)
LAYERS = (("/conv1/Conv + /relu", 0.3, 75), ("/fc/Gemm", 0.1, 25))
ROW = "min = 0.8448 ms, max = 2.31027 ms, mean = 1.34285 ms, median = 0.873472 ms"
NOTHING = "min = 0 ms, max = 0 ms, mean = 0 ms, median = 0 ms"
SUMMARY = (
    "Timing trace has 3 queries over 0.00402854 s", "=== Performance summary ===", "Throughput: 744.687 qps", f"Latency: {ROW}",
    f"Enqueue Time: {NOTHING}", f"H2D Latency: {NOTHING}", f"GPU Compute Time: {ROW}", f"D2H Latency: {NOTHING}",
    "Total Host Walltime: 0.00402854 s", "Total GPU Compute Time: 0.00402854 s",
    "Explanations of the performance metrics are printed in the verbose logs.",
)  # fmt: skip
KEYS = "startEnqMs endEnqMs startH2dMs endH2dMs startComputeMs endComputeMs startD2hMs endD2hMs h2dMs computeMs d2hMs"


def main(arguments: list[str]) -> int:
    with Path(os.environ["FAKE_TENSORRT_RECORD"]).open("a") as stream:
        stream.write(json.dumps({"call": "trtexec", "of": os.getpid(), "with": arguments}) + "\n")
    banner("RUNNING")
    known = [flag for versions, flags in FACTS["flags"].items() if covers(versions) for flag in flags.split()]
    known = [flag for flag in known if flag not in LACKS.get(VERSION, "").split()]
    if "--help" in arguments:
        print("=== Model Options ===", *(f"  {flag:<30} what it does" for flag in known), sep="\n")
        return 0
    options = {flag: value for flag, _, value in (text.partition("=") for text in arguments)}
    unknown = [flag for flag in options if flag not in known]
    for flag in unknown:
        print(f"[10/05/2025-10:46:31] [E] Unknown option: {flag} {options[flag]}")
    return banner("FAILED" if unknown or not work(options) else "PASSED")


def covers(versions: str) -> bool:
    return versions == "*" or {"8.5": "8.6.1"}.get(VERSION, VERSION) in versions.split()


def banner(word: str) -> int:
    print(f"&&&& {word} TensorRT.trtexec [TensorRT {BANNERS[VERSION]}] # {' '.join(sys.argv)}", flush=True)
    return int(word == "FAILED")


def work(options: dict[str, str]) -> bool:
    if "crash" in FAILS:
        sys.stdout.flush()
        os.abort()
    if "killed" in FAILS:
        os.kill(os.getpid(), 9)
    if "hang" in FAILS:
        time.sleep(30)
    if "--onnx" in options:
        if "build" in FAILS:
            print(
                "[10/05/2025-10:46:31] [E] [TRT] Error Code 10: Internal Error (no implementation for node /conv1/Conv)"
            )
            print("[10/05/2025-10:46:31] [E] Engine could not be created from network")
            return False
        Path(options["--saveEngine"]).write_bytes(MAGIC + Path(options["--onnx"]).read_bytes())
        Path(options["--timingCacheFile"]).write_bytes(b"a timing\n")
        print("[10/05/2025-10:46:31] [I] Engine built in 27.8143 sec.")
        return True
    if not Path(options["--loadEngine"]).read_bytes().startswith(MAGIC):
        print("[10/05/2025-10:46:31] [E] Engine deserialization failed")
        return False
    print("[10/05/2025-10:46:31] [I] Engine deserialized in 0.0117302 sec.")
    if "--exportProfile" in options:
        rows = [f', {{ "name" : "{name}", "timeMs" : {ms}, "averageMs" : {ms}, "medianMs" : {ms}, "percentage" : {percent} }}'
                for name, ms, percent in LAYERS]  # fmt: skip
        Path(options["--exportProfile"]).write_text("\n".join(["[", '  { "count" : 1 }', *rows, "]"]))
        Path(options["--exportLayerInfo"]).write_text(
            json.dumps({"Layers": [name for name, *_ in LAYERS], "Bindings": []})
        )
        return True
    moments = [sum(LATENCIES[:number]) for number in range(len(LATENCIES) + 1)]
    times = [
        dict.fromkeys(KEYS.split(), start) | {"h2dMs": 0, "d2hMs": 0, "computeMs": ms, "latencyMs": ms}
        | {"startComputeMs": start, "endComputeMs": end, "startD2hMs": end, "endD2hMs": end}
        for ms, start, end in zip(LATENCIES, moments, moments[1:], strict=False)
    ]  # fmt: skip
    Path(options["--exportTimes"]).write_text(json.dumps(times))
    if "error" in FAILS:
        print("[10/05/2025-10:46:31] [E] Error[1]: [executor] Cask Pooling Runner Execute Failure")
    print(*(f"[10/05/2025-10:46:31] [I] {line}" for line in SUMMARY), sep="\n")
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
