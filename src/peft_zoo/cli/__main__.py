"""`python -m peft_zoo.cli`."""

import sys

from peft_zoo.cli.main import main

sys.exit(main())
