"""python -m torchlift"""

import sys

from torchlift._check import main

sys.exit(main())
