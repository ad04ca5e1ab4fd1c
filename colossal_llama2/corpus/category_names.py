"""What the category of a document is called on screens, in pictures and in reports."""

# What the original writes for fine-tuning data without a category.
NO_CATEGORY_SFT = "None"
NO_CATEGORY = "no category"


def category_name(category: str | None) -> str:
    """A category as it is shown: that of a document without one is NO_CATEGORY."""
    return NO_CATEGORY if category in (None, NO_CATEGORY_SFT) else str(category)
