"""The extractor of documentation examples."""

import pytest

from doc_examples import extract

PAGE = """
```python
a = 1
```

<!-- continued -->
```python
assert a == 1
```

<!-- not run -->
```python
raise Exception
```

```bash
exit 1
```

- an item
  ```python
  b = 2
  ```

<!-- in main -->
```cpp
#include <vector>
std::vector<int> v;
```
"""


def test_blocks():
    python, item, cpp = extract(PAGE, "page")
    assert python.text == "a = 1\nassert a == 1\n"
    assert python.where == "page:2"
    assert item.text == "b = 2\n"
    assert cpp.text == "#include <vector>\nint main() {\nstd::vector<int> v;\nreturn 0;\n}\n"


def test_nothing_to_continue():
    with pytest.raises(ValueError, match="page:2: nothing of this language"):
        extract("<!-- continued -->\n```cpp\n```\n", "page")
