import importlib
from types import ModuleType


def require_extra(module: str, extra: str) -> ModuleType:
    """Imports an optional `module`, or says which `extra` brings it.

    An extra bears the name of the sub-package that needs it.

    **Arguments:**

    - `module`: the full name of the module, such as `"matplotlib.pyplot"`.
    - `extra`: the extra that installs it, such as `"train"`.

    **Returns:**

    The imported module.

    **Raises:**

    - `ImportError`: `module` is not installed. An import that fails inside an
        installed `module` is raised as it is.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        package = module.split(".")[0]
        raise ImportError(
            f"capibara_eqx.{extra} needs {package}, which is not installed: "
            f"pip install 'capibara-eqx[{extra}]'",
            name=module,
        ) from error
