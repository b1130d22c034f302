"""Under another name, since a file cannot both use a built-in and export one of that name."""

BUILTIN_CC_INFO = CcInfo
