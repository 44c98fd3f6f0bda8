"""`python -m faults DRIVER OPTIONS`: runs a driver, and prints what came of it as JSON."""

import json
import sys
from dataclasses import asdict

import faults

if __name__ == "__main__":
    outcome = getattr(faults, sys.argv[1])(**json.loads(sys.argv[2]))
    sys.stdout.write(json.dumps(asdict(outcome)) + "\n")
