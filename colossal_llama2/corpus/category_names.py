"""How the category of a document is shown on screens, in charts and in reports."""

# What the original writes for fine-tuning data without a category.
NO_CATEGORY_SFT = "None"
NO_CATEGORY = "no category"


def category_name(category: str | None) -> str:
    """The text shown for a category; NO_CATEGORY for a document without one."""
    return NO_CATEGORY if category in (None, NO_CATEGORY_SFT) else str(category)
