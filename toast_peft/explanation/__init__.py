"""What the feedback sees and what it changes: `toast_peft.explain`, in arrays and in pictures."""
