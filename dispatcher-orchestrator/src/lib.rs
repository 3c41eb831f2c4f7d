//! Dispatcher managers are born, fenced and closed in order.
