"""Sends a running service bodies by the thousand, valid and not, made from its OpenAPI schema: none may fail it.

    python run.py serve --adapter cola=RUN_DIR --adapters-root runs &
    python benchmarks/fuzz_service.py http://127.0.0.1:8000 --cases 2500

The cases are schemathesis's. Each answer must be one that the schema documents, JSON where it says so, and no server error;
the service must still answer afterwards. Exit status 0 if none failed.
"""
from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance


def fuzz(url: str, cases: int, number: int = 0) -> dict:
    """Tries so many bodies on each operation that takes one, and as many names on the others.

    Every second body with texts names an adapter or student that is served, so that the texts are classified.

    Returns:
        tried, classified: how many of them were, and failed: a description of each failure.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    with urllib.request.urlopen(f"{url}/v1/adapters", timeout=10) as answer:
        listed = json.load(answer)
    served = [entry["name"] for entry in (*listed["adapters"], *listed["students"])]
    result = {"tried": 0, "classified": 0, "failed": []}
    load_all_checks()
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    for operation in (found.ok() for found in schema.get_all_operations() if found.ok().method in ("post", "delete")):
        for mode in GenerationMode:
            @seed(number)
            @settings(max_examples=cases, deadline=None, database=None, phases=[Phase.generate],
                      suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def one(case) -> None:
                result["tried"] += 1
                asks = case.path == "/v1/classify" and isinstance(case.body, dict)
                if asks and result["tried"] % 2:
                    case.body.pop("student", None)
                    case.body["adapter"] = served[result["tried"] // 2 % len(served)]
                response = case.call(timeout=30)
                result["classified"] += asks and response.status_code == 200
                case.validate_response(response, checks=checks)
            try:
                one()
            except Unsatisfiable:  # nothing about the operation can be wrong
                pass
            except Exception as error:
                result["failed"].append(f"{operation.label}: {str(error)[:600]}")
    with urllib.request.urlopen(f"{url}/healthz", timeout=10) as answer:
        if json.load(answer) != {"status": "ok"}:
            result["failed"].append("the service no longer answers")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--cases", type=int, default=2500, help="of each operation, valid and not")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    result = fuzz(args.url.rstrip("/"), args.cases, args.seed)
    if args.json:
        from benchmarks import common  # late: it sets the environment that libraries read when imported

        print(common.result({"seed": args.seed, **result}))
    else:
        print(f"{result['tried']:,} tried, {result['classified']:,} of them classified, {len(result['failed'])} failed",
              *result["failed"], sep="\n  ")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
